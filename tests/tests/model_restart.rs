//! scratch
#![allow(missing_docs, clippy::unwrap_used)]
use kvring_tests::model::restart::*;
use kvring_tests::model::check;
fn run(name: &str, b: Bounds, broken: Option<Break>) {
    let t = std::time::Instant::now();
    match check(&Restart{bounds:b, broken}, 8_000_000) {
        Ok(e) => println!("OK   {name} {broken:?} {e:?} {:?}", t.elapsed()),
        Err(c) => println!("FAIL {name} {broken:?} {:?}\n{c}", t.elapsed()),
    }
}
fn left(ed:u8, cd:u8, cold:u8, ev:u8, to:u8, lv:u8)->Left{Left{engine_deaths:ed,client_deaths:cd,cold_starts:cold,evictions:ev,timeouts:to,leaves:lv}}
#[test] fn all() {
    println!("state bytes {}", std::mem::size_of::<State>());
    let l = Bounds::LEAST;
    run("attach1", Bounds{left:left(2,1,0,0,0,0), ..l}, None);
    run("attach1 health", Bounds{left:left(2,1,0,0,1,1), health:true, ..l}, None);
    run("attach 2/1", Bounds{clients:2, left:left(1,1,0,0,0,0), ..l}, None);
    run("store1", Bounds{stores:[1,0], left:left(1,1,0,0,0,0), ..l}, None);
    run("store1 2", Bounds{stores:[1,0], left:left(2,1,0,0,1,0), ..l}, None);
    run("store2 2e1s", Bounds{clients:2, entries:2, stores:[1,1], left:left(1,1,0,0,0,0), ..l}, None);
}

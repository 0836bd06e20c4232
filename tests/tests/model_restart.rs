//! scratch
#![allow(missing_docs, clippy::unwrap_used)]
use kvring_tests::model::restart::*;
use kvring_tests::model::check;
fn run(name: &str, b: Bounds, broken: Option<Break>) {
    let t = std::time::Instant::now();
    let r = std::panic::catch_unwind(|| match check(&Restart{bounds:b, broken}, 6_000_000) {
        Ok(e) => println!("OK   {name} {broken:?} {e:?} {:?}", t.elapsed()),
        Err(c) => println!("FAIL {name} {broken:?} {:?}\n{c}", t.elapsed()),
    });
    if r.is_err() { println!("BIG  {name} {:?}", t.elapsed()); }
}
fn left(ed:u8, cd:u8, cold:u8, ev:u8, to:u8, lv:u8)->Left{Left{engine_deaths:ed,client_deaths:cd,cold_starts:cold,evictions:ev,timeouts:to,leaves:lv}}
#[test] fn all() {
    println!("state bytes {}", std::mem::size_of::<State>());
    let l = Bounds::LEAST;
    let a = Bounds{attached:true, ..l};
    let c = Bounds{coarse:true, ..a};
    let scen: Vec<(&str, Bounds)> = vec![
      ("attach", Bounds{clients:2, left:left(2,2,0,0,0,1), ..l}),
      ("health", Bounds{left:left(2,1,0,0,1,1), health:true, ..l}),
      ("store", Bounds{stores:[1,0], left:left(2,1,0,0,1,1), ..a}),
      ("successor", Bounds{clients:2, entries:1, stores:[1,1], left:left(2,2,0,0,0,1), coarse:true, ..l}),
      ("stores", Bounds{clients:2, entries:2, stores:[1,1], left:left(1,1,0,0,0,0), ..c}),
      ("load", Bounds{clients:1, entries:1, stores:[2,0],loads:[1,0],keys:2, left:left(2,1,0,1,0,0), ..a}),
      ("load2", Bounds{clients:2, entries:2, stores:[2,0],loads:[0,1],keys:2, left:left(1,0,0,1,0,0), ..c}),
      ("cold", Bounds{clients:2, entries:1, stores:[1,1],loads:[0,0],keys:1, left:left(2,1,1,1,0,1), ..l}),
      ("coldload", Bounds{clients:1, entries:1, stores:[2,0],loads:[1,0],keys:2, left:left(2,0,1,1,0,0), ..a}),
      ("liar", Bounds{clients:2, entries:2, stores:[1,0], left:left(1,0,0,0,0,0),liar:true, ..c}),
    ];
    use Break::*;
    for (n,b) in &scen { run(n,*b,None); }
    for br in [NoGrantFence, OmitsRunningCopy, DeclareEndFreesAdopted, ForgetsOwedCommits, ResetsBeforeReclaim, WordsBeforeOdd, RecoveryFreesLiving, AdoptsOthers, ZeroesInPlace, NoGenerationCheck, NoPending, JudgesOnce, JudgesAnyIncarnation, PlusOne, IncarnationFirst, LeavesWhileCopying, NeverFreesUndeclared, RecyclesGenerations] {
      for (n,b) in &scen {
        match check(&Restart{bounds:*b, broken:Some(br)}, 6_000_000) {
          Ok(_) => {}
          Err(c) => println!("{br:?} {n}: {} {} steps", c.what, c.trace.len()-1),
        }
      }
    }
    run("linger", Bounds{clients:2, entries:2, stores:[1,1], left:left(0,1,0,0,0,0), threads_linger:true, ..c}, None);
    run("linger fix", Bounds{clients:2, entries:2, stores:[1,1], left:left(1,1,0,0,0,0), threads_linger:true, waits_for_process:true, ..c}, None);
    run("tids", Bounds{clients:2, entries:1, left:left(0,1,0,0,0,0), equal_tids:true, ..l}, None);
}

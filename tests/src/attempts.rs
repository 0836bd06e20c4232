//! Attempts to attach that must fail: what the client says, and that it leaves nothing behind.

use crate::engine::{EngineProcess, channels, claimed_entries};
use crate::isolate::Footprint;
use crate::proto::ClientSpec;
use crate::wait::{LIMIT, becomes};
use crate::worker::client;
use kvring_adapter::{Health, Role};
use kvring_shm_abi::lobby::Lobby;
use std::time::Duration;

/// The clients that are attached while another one fails to. The lobby is opened before anything is broken.
pub struct Others {
    pub lobby: Lobby,
    pub count: usize,
}

/// A newcomer says all `parts`, and its further attempts leave nothing behind.
pub fn fails_cleanly(engine: &EngineProcess, others: &Others, role: Role, parts: &[&str]) {
    becomes("claimed entries", others.count, || claimed_entries(&others.lobby));
    let before = Footprint::now(&engine.name);
    let newcomer = client(role, &ClientSpec { attach_ms: 50, ..ClientSpec::new(&engine.name) });
    becomes(&format!("{role:?}: what the client says without {parts:?}"), String::new(), || {
        let said = newcomer.health().to_string();
        if parts.iter().all(|part| said.contains(part)) { String::new() } else { said }
    });
    let error = newcomer.diagnose().map(|error| error.to_string()).unwrap_or_default();
    // The keeper tries again every 2 to 20 ms: its attempts come and go.
    std::thread::sleep(Duration::from_millis(150));
    assert!(!newcomer.is_healthy(), "{error}");
    let during = Footprint::now(&engine.name);
    assert_eq!(during.threads.len(), before.threads.len() + 1, "one keeper: {during:?}");
    newcomer.shutdown();
    assert_eq!(newcomer.health(), Health::ShutDown);
    becomes("threads, mappings, descriptors", before, || Footprint::now(&engine.name));
    becomes("claimed entries", others.count, || claimed_entries(&others.lobby));
    assert_eq!(channels(&engine.name), Vec::<String>::new());
}

/// A client that fails as long as the segment is as it is attaches by itself once it is put right.
pub fn mends_itself(engine: &EngineProcess, role: Role, put_right: impl FnOnce()) {
    let newcomer = client(role, &ClientSpec::new(&engine.name));
    // Long enough for several attempts. How long does not matter, only that it is not attached.
    assert!(newcomer.wait_ready(Duration::from_millis(30)).is_err());
    put_right();
    newcomer.wait_ready(LIMIT).unwrap();
}

//! Attempts to attach that must fail: what they say, and that they leave nothing behind.

use crate::engine::{EngineProcess, claimed_entries};
use crate::isolate::{Footprint, segments};
use crate::proto::ClientSpec;
use crate::wait::{LIMIT, becomes, eventually};
use crate::worker::client;
use kvring_adapter::{Client, Health, Role};
use kvring_shm_abi::lobby::Lobby;
use std::sync::Arc;
use std::time::Duration;

fn said(client: &Arc<Client>) -> String {
    client.health().to_string()
}

/// Who is attached while somebody else fails to. The lobby is opened before anything is broken.
pub struct Others {
    /// The lobby.
    pub lobby: Lobby,
    /// Clients that are attached.
    pub count: usize,
}

/// The state is reached, its message holds all `parts`, and several further attempts leave nothing behind.
///
/// # Panics
/// When something is left, or the message is another.
pub fn fails_cleanly(engine: &EngineProcess, others: &Others, role: Role, parts: &[&str]) {
    becomes("claimed entries", others.count, || claimed_entries(&others.lobby));
    let before = Footprint::now(&engine.name);
    let spec = ClientSpec { attach_ms: 50, ..ClientSpec::new(&engine.name) };
    let newcomer = client(role, &spec);
    eventually(&format!("{role:?}: the client says {parts:?}; it says {}", said(&newcomer)), || {
        let said = said(&newcomer);
        parts.iter().all(|part| said.contains(part))
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
    assert_eq!(segments(&engine.name).iter().filter(|name| name.contains(".client.")).count(), 0);
}

/// A client that fails as long as the segment is as it is, attaches by itself once it is put right.
///
/// # Panics
/// When it attaches before, or does not after.
pub fn mends_itself(engine: &EngineProcess, role: Role, put_right: impl FnOnce()) {
    let newcomer = client(role, &ClientSpec::new(&engine.name));
    // Long enough for several attempts: how long does not matter, only that it is not attached.
    assert!(newcomer.wait_ready(Duration::from_millis(30)).is_err());
    put_right();
    newcomer.wait_ready(LIMIT).unwrap();
}

//! What is left in the end: what living clients hold, and in the very end nothing.

use super::checks::Checks;
use crate::engine::{EngineProcess, stat_of};
use crate::isolate::segments;

/// Nothing of any client is left but of `clients` that are attached, with `leases` leases and `writing` slots that they
/// write: no orphan, no channel, no entry. The engine has found nothing wrong with itself. Where `forming`, rounds may wait
/// for another one to replace them.
pub fn is_settled(
    checks: &mut Checks,
    engine: &EngineProcess,
    clients: u64,
    leases: u64,
    writing: u64,
    forming: bool,
) {
    let view = engine.view();
    let all = ["leases", "slots_writing", "slots_orphaned", "clients", "breaches", "check_failures"];
    let expected = [leases, writing, 0, clients, 0, 0];
    checks.becomes(format!("{all:?}"), expected, || all.map(|name| stat_of(&view, name)));
    if !forming {
        checks.becomes("chunks that form for nobody", 0, || stat_of(&view, "chunks_forming"));
    }
    let lobby = engine.lobby();
    let entries = || crate::engine::claimed_entries(&lobby) as u64;
    checks.becomes("claimed entries", clients, entries);
    checks.becomes("channels with a name", 0, || {
        segments(&engine.name).iter().filter(|name| name.contains(".client.")).count()
    });
}

/// The engine is asked to stop, after its last client has gone: nothing is left.
pub fn is_gone(checks: &mut Checks, engine: &mut EngineProcess) {
    is_settled(checks, engine, 0, 0, 0, false);
    // It checks itself while it is idle: twenty ticks are 1280 steps.
    engine.beats(20);
    checks.same("failed self-checks", 0, stat_of(&engine.view(), "check_failures"));
    checks.same("the engine's exit", Some(0), engine.terminate());
    checks.same("left in /dev/shm", Vec::new(), segments(&engine.name).into_iter().collect());
}

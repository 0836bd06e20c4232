//! The properties that must hold: see the module above.

use super::bounds::Bounds;
use super::state::{Busy, Bytes, Keeper, Loader, Mover, NONE, Phase, Process, State, Use, Word};

/// What is wrong with a state.
pub(super) fn violation(bounds: &Bounds, state: &State) -> Option<&'static str> {
    if state.failed.is_some() {
        return state.failed;
    }
    let mut written = 0u8;
    for client in 0..bounds.clients {
        let who = &state.clients[client];
        if let Mover::Copying(grant) = who.mover
            && state.is_current(client)
        {
            let slot = &state.slots[grant.slot as usize];
            if written & (1 << grant.slot) != 0 {
                return Some("S1: two copies run into one slot");
            }
            written |= 1 << grant.slot;
            match slot.used {
                Use::Free => return Some("S1: a copy runs into a slot that is free"),
                Use::Committed => return Some("S1: a copy runs into a slot that is committed"),
                Use::Writing(entry) if entry != who.entry => {
                    return Some("S1: a copy runs into a slot that is somebody else's");
                }
                Use::Writing(_) if slot.generation != grant.generation => {
                    return Some("S1: a copy runs into a slot of another generation");
                }
                Use::Writing(_) => {}
            }
        }
        if is_unknown_lease(state, client) {
            return Some("S3: a client holds a lease that its engine does not know");
        }
        let owns = who.process == Process::Alive && who.owns() && state.is_current(client);
        if owns && state.words[who.entry as usize] != Word::Alive(client as u8) {
            return Some("S4: a living client's entry is not its own");
        }
    }
    let torn = |slot: &&super::state::Slot| slot.used == Use::Committed && slot.bytes != Bytes::Of(slot.key);
    state.slots.iter().find(torn).map(|_| "S2: committed, and not its key's bytes")
}

/// Does it hold a handle that is good, with an engine that does not pin it?
fn is_unknown_lease(state: &State, client: usize) -> bool {
    let who = &state.clients[client];
    let entry = who.entry as usize;
    let attached = who.process == Process::Alive
        && who.keeper == Keeper::Ready
        && state.is_current(client)
        && state.engine.connected[entry] == who.nonce;
    let Some(handle) = who.lease().filter(|_| attached) else { return false };
    let good = state.slots[handle.slot as usize].used == Use::Committed && state.is(handle);
    good && state.engine.leases[entry] & (1 << handle.slot) == 0
}

/// What is wrong with a state at rest.
pub(super) fn at_rest(bounds: &Bounds, state: &State) -> Option<&'static str> {
    let engine = &state.engine;
    if engine.phase != Phase::Serving || engine.busy != Busy::Idle {
        return Some("S5: at rest, and no engine serves");
    }
    let full = state.words[..bounds.entries].iter().all(|word| *word != Word::Unclaimed);
    let mut attached = 0;
    for client in &state.clients[..bounds.clients] {
        match (client.process, client.keeper) {
            (Process::Ended, _) => return Some("S4: at rest, and a death was never marked"),
            (Process::Gone, _) => continue,
            (Process::Alive, Keeper::Away) if full => continue,
            (Process::Alive, Keeper::Ready) => {}
            (Process::Alive, _) => return Some("S5: at rest, and a living client is not attached"),
        }
        attached += 1;
        if engine.connected[client.entry as usize] != client.nonce {
            return Some("S5: at rest, and a client is attached that the engine does not know");
        }
        if client.incarnation != state.incarnation {
            return Some("S6: at rest, and a client means another incarnation");
        }
        if client.mover != Mover::Idle || client.loader != Loader::Idle {
            return Some("S4: at rest, and a client still owes or holds something");
        }
    }
    for entry in 0..bounds.entries {
        match state.words[entry] {
            Word::Dead => return Some("S4: at rest, and a dead word was not reclaimed"),
            Word::Alive(owner) if state.clients[owner as usize].process != Process::Alive => {
                return Some("S4: at rest, and an entry is lost to the dead");
            }
            Word::Alive(_) | Word::Unclaimed => {}
        }
    }
    if engine.connected.iter().filter(|nonce| **nonce != NONE).count() != attached {
        return Some("S5: at rest, and not one attachment for each client");
    }
    if state.slots.iter().any(|slot| matches!(slot.used, Use::Writing(_))) {
        return Some("S4: at rest, and a slot is WRITING for nobody");
    }
    if engine.leases.iter().any(|leases| *leases != 0) {
        return Some("S4: at rest, and a lease is nobody's");
    }
    if state.files.iter().any(|file| *file != NONE) {
        return Some("S4: at rest, and a channel was left behind");
    }
    (engine.awaited != 0).then_some("S5: at rest, and still in the time of grace")
}

//! The properties that must hold: see the module above.

use super::bounds::Bounds;
use super::state::{At, Busy, Bytes, Keeper, Mover, NONE, Phase, Process, Reader, Record, State, Use, Word};

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
        if let Some(wrong) = hold_violation(state, client) {
            return Some(wrong);
        }
        let owns = who.process == Process::Alive && who.owns() && state.is_current(client);
        if owns && state.words[who.entry as usize] != Word::Alive(client as u8) {
            return Some("S4: a living client's entry is not its own");
        }
    }
    let torn = |slot: &&super::state::Slot| slot.used == Use::Committed && slot.bytes != Bytes::Of(slot.key);
    state.slots.iter().find(torn).map(|_| "S2: committed, and not its key's bytes")
}

/// What is wrong with what a client holds by a lookup that has been answered.
fn hold_violation(state: &State, client: usize) -> Option<&'static str> {
    let who = &state.clients[client];
    let handle = who.answered().filter(|_| who.process == Process::Alive && state.is_current(client))?;
    let slot = &state.slots[handle.slot as usize];
    let is_there = slot.has(handle) && slot.used == Use::Committed;
    if !is_there {
        return (who.late == 0).then_some("S3: what a client holds is gone");
    }
    let entry = who.entry as usize;
    let is_heard = who.keeper == Keeper::Ready
        && who.at == At::Attached
        && state.engine.connected[entry] == who.accepts
        && who.told
        && who.said.is_none();
    let is_known = state.engine.leases[entry] & (1 << handle.slot) != 0;
    (is_heard && !is_known).then_some("S3: an engine has heard what a client holds, and does not know it")
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
        if client.mover != Mover::Idle || client.reader != Reader::Idle {
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
    if state.slots.iter().any(|slot| (slot.record == Record::Visible) != (slot.used == Use::Committed)) {
        return Some("S4: at rest, and a chunk is marked, or not shown");
    }
    if state.clients.iter().any(|client| client.unpublished || client.said.is_some() || client.ends) {
        return Some("S4: at rest, and something is unpublished or unheard");
    }
    if state.files.iter().any(|file| *file != NONE) {
        return Some("S4: at rest, and a channel was left behind");
    }
    (engine.awaited != 0).then_some("S5: at rest, and still in the time of grace")
}

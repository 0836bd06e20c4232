//! Every interleaving, within bounds, of attach, claim, death, restart, declare, reclaim, lookups and evictions: see
//! `kvring_tests::model::restart` for what is modelled and for the properties S1 to S6.
//!
//! Each rule of the protocol has a negative control: a model without it, in bounds in which the protocol holds, where a
//! counterexample must be found. `cargo test --test model_restart -- --nocapture` shows them.
#![allow(clippy::unwrap_used, reason = "test code: a panic is how a test fails")]

use kvring_tests::model::check;
use kvring_tests::model::restart::{Bounds, Break, Left, Restart};
use kvring_tests::soak;

/// States that a check may have.
const STATES_MAX: usize = 6_000_000;

const NOTHING: Left = Bounds::LEAST.left;

/// One entry, two clients that come, go and die, two lives of the engine that end. Every step of a claim.
const ATTACH: Bounds = Bounds {
    clients: 2,
    left: Left { engine_deaths: 2, client_deaths: 2, leaves: 1, ..NOTHING },
    ..Bounds::LEAST
};

/// Two entries.
const ATTACH_TWO: Bounds = Bounds {
    clients: 2,
    entries: 2,
    left: Left { engine_deaths: 1, client_deaths: 1, ..NOTHING },
    ..Bounds::LEAST
};

/// A client that looks at the engine's health all the time, and gives up waiting.
const HEALTH: Bounds = Bounds {
    health: true,
    left: Left { engine_deaths: 2, client_deaths: 1, timeouts: 1, leaves: 1, ..NOTHING },
    ..Bounds::LEAST
};

/// One store over three lives of the engine. Every step of it.
const STORE: Bounds = Bounds {
    attached: true,
    stores: [1, 0],
    left: Left { engine_deaths: 2, client_deaths: 1, timeouts: 1, leaves: 1, ..NOTHING },
    ..Bounds::LEAST
};

/// One client's entry and slot become another's.
const SUCCESSOR: Bounds = Bounds {
    clients: 2,
    coarse: true,
    stores: [1, 1],
    left: Left { engine_deaths: 2, client_deaths: 2, leaves: 1, ..NOTHING },
    ..Bounds::LEAST
};

/// Two clients want the same slot.
const CONTENTION: Bounds = Bounds {
    clients: 2,
    entries: 2,
    attached: true,
    coarse: true,
    stores: [1, 1],
    left: Left { engine_deaths: 1, client_deaths: 1, ..NOTHING },
    ..Bounds::LEAST
};

/// One client stores twice, two keys in two slots.
const TWO_SLOTS: Bounds = Bounds {
    slots: 2,
    keys: 2,
    attached: true,
    stores: [2, 0],
    left: Left { engine_deaths: 2, evictions: 1, ..NOTHING },
    ..Bounds::LEAST
};

/// One client looks up and loads what is there, while it is evicted. Every step of it.
const HOLD: Bounds = Bounds {
    attached: true,
    stored: true,
    loads: [1, 0],
    left: Left { engine_deaths: 2, client_deaths: 1, evictions: 1, full_rings: 1, timeouts: 1, ..NOTHING },
    ..Bounds::LEAST
};

/// Two clients look up and load the same, while it is evicted.
const HOLD_TWO: Bounds = Bounds {
    clients: 2,
    entries: 2,
    coarse: true,
    loads: [1, 1],
    left: Left { engine_deaths: 1, client_deaths: 1, evictions: 1, ..NOTHING },
    ..HOLD
};

/// One client looks up twice.
const HOLD_AGAIN: Bounds =
    Bounds { loads: [2, 0], left: Left { engine_deaths: 1, client_deaths: 0, ..HOLD.left }, ..HOLD };

/// Lookups over a start on new inodes, by a client that leaves.
const HOLD_COLD: Bounds = Bounds {
    loads: [2, 0],
    left: Left { engine_deaths: 1, evictions: 1, cold_starts: 1, leaves: 1, ..NOTHING },
    ..HOLD
};

/// One client loads what it has stored, while its slot is evicted and stored into again.
const LOAD: Bounds = Bounds {
    keys: 2,
    attached: true,
    stores: [2, 0],
    loads: [1, 0],
    left: Left { engine_deaths: 1, client_deaths: 1, evictions: 1, ..NOTHING },
    ..Bounds::LEAST
};

/// The same, and a client that loses patience.
const LOAD_IMPATIENT: Bounds =
    Bounds { left: Left { engine_deaths: 1, evictions: 1, timeouts: 1, ..NOTHING }, ..LOAD };

/// One client loads what another stores.
const LOAD_OTHERS: Bounds = Bounds {
    clients: 2,
    entries: 2,
    coarse: true,
    loads: [0, 1],
    left: Left { engine_deaths: 1, evictions: 1, ..NOTHING },
    ..LOAD
};

/// Two clients, one entry, a start on new inodes in between.
const COLD: Bounds =
    Bounds { left: Left { engine_deaths: 2, client_deaths: 1, cold_starts: 1, ..NOTHING }, ..SUCCESSOR };

/// A load over a start on new inodes.
const COLD_LOAD: Bounds =
    Bounds { left: Left { engine_deaths: 1, evictions: 1, cold_starts: 1, ..NOTHING }, ..LOAD };

/// A client that says that it writes every slot.
const LIAR: Bounds =
    Bounds { liar: true, stores: [1, 0], left: Left { engine_deaths: 1, ..NOTHING }, ..CONTENTION };

/// The protocol holds within these bounds.
#[track_caller]
fn holds(bounds: Bounds) {
    match check(&Restart { bounds, broken: None }, STATES_MAX) {
        Ok(explored) => println!("{explored:?}"),
        Err(found) => panic!("{found}"),
    }
}

/// Without that rule, that property does not.
#[track_caller]
fn control(broken: Break, bounds: Bounds, property: &str) {
    caught(Some(broken), bounds, property);
}

#[track_caller]
fn caught(broken: Option<Break>, bounds: Bounds, property: &str) {
    let Err(found) = check(&Restart { bounds, broken }, STATES_MAX) else {
        panic!("{broken:?}: nothing was found")
    };
    println!("{broken:?}: {found}");
    assert!(found.what.starts_with(property), "{broken:?}: expected {property}, found: {found}");
}

#[test]
fn clients_come_and_go_in_one_entry() {
    holds(ATTACH);
}

#[test]
fn clients_come_and_go_in_two_entries() {
    holds(ATTACH_TWO);
}

#[test]
fn health_is_of_the_living_engine() {
    holds(HEALTH);
}

#[test]
fn a_store_outlives_its_engine() {
    holds(STORE);
    holds(TWO_SLOTS);
}

#[test]
fn an_entry_and_a_slot_change_hands() {
    holds(SUCCESSOR);
    holds(CONTENTION);
}

#[test]
fn what_is_held_stays() {
    holds(HOLD);
    holds(HOLD_TWO);
    holds(HOLD_AGAIN);
    holds(HOLD_COLD);
}

#[test]
fn loads_bring_their_keys_bytes() {
    holds(LOAD);
    holds(LOAD_IMPATIENT);
    holds(LOAD_OTHERS);
}

#[test]
fn a_cold_start_is_another_world() {
    holds(COLD);
    holds(COLD_LOAD);
}

#[test]
fn nobody_is_given_what_it_merely_claims() {
    holds(LIAR);
}

/// Minutes, and half a gigabyte: in soaks alone.
#[test]
fn deeper() {
    if soak() == 1 {
        return;
    }
    holds(Bounds { left: Left { engine_deaths: 2, ..NOTHING }, ..CONTENTION });
    holds(Bounds { stores: [2, 0], left: Left { evictions: 1, ..STORE.left }, ..STORE });
    let one_restart = Left { engine_deaths: 1, evictions: 1, timeouts: 1, ..NOTHING };
    holds(Bounds { loads: [1, 0], left: one_restart, ..TWO_SLOTS });
    holds(Bounds { left: Left { full_rings: 1, ..one_restart }, ..HOLD_TWO });
    holds(Bounds { left: Left { engine_deaths: 2, ..HOLD_AGAIN.left }, ..HOLD_AGAIN });
    holds(Bounds { left: Left { engine_deaths: 2, ..LOAD.left }, ..LOAD });
    holds(Bounds { left: Left { leaves: 1, ..LOAD_IMPATIENT.left }, ..LOAD_IMPATIENT });
    holds(Bounds { left: Left { engine_deaths: 2, evictions: 1, cold_starts: 1, ..NOTHING }, ..LOAD });
    holds(Bounds { keys: 2, stores: [2, 1], left: Left { evictions: 1, ..CONTENTION.left }, ..CONTENTION });
    holds(Bounds { left: Left { engine_deaths: 2, cold_starts: 1, ..NOTHING }, ..CONTENTION });
    let all_steps = Left { engine_deaths: 2, client_deaths: 1, timeouts: 1, ..NOTHING };
    holds(Bounds { coarse: false, left: all_steps, ..SUCCESSOR });
}

#[test]
fn controls_of_declaring() {
    control(Break::NoGrantFence, STORE, "S1");
    control(Break::OmitsRunningCopy, STORE, "S1");
    control(Break::DeclareEndFreesAdopted, STORE, "S1");
    control(Break::NeverFreesUndeclared, STORE, "S4");
    control(Break::EarlyChannel, STORE, "S4");
    control(Break::ForgetsOwedCommits, STORE, "S4");
    control(Break::AdoptsOthers, LIAR, "S1");
}

#[test]
fn controls_of_lookups() {
    control(Break::NoSecondLook, HOLD, "S3");
    control(Break::SaysAfterTheLook, HOLD, "S3");
    control(Break::EntersLate, HOLD, "S3");
    control(Break::JudgesMarksOnce, HOLD, "S3");
    control(Break::IgnoresEvicting, HOLD, "S3");
    control(Break::StaysUnpublished, HOLD, "S4");
}

#[test]
fn controls_of_evicting() {
    control(Break::RingsBeforeTheMark, HOLD, "S3");
    control(Break::IgnoresUnpublished, HOLD, "S3");
    control(Break::DropsWhatIsHeld, HOLD, "S3");
    control(Break::FreesTheSlotFirst, HOLD, "S3");
    control(Break::AnnouncesAfterTheMark, HOLD, "S3");
    control(Break::EvictsInGrace, HOLD, "S3");
    control(Break::KeepsMarks, HOLD, "S4");
}

#[test]
fn controls_of_declaring_leases() {
    control(Break::OmitsLeases, HOLD, "S3");
    control(Break::EarlyDeclareEnd, HOLD, "S3");
    control(Break::DeclaresAfterTheEnd, HOLD, "S3");
    control(Break::TrustsWhatIsNotDeclared, HOLD, "S3");
    control(Break::SendsReleasesFirst, HOLD, "S4");
    control(Break::ForgetsOwedReleases, HOLD, "S4");
    control(Break::ForgetsAtASecondAttempt, HOLD, "S4");
}

#[test]
fn controls_of_claiming_and_reclaiming() {
    control(Break::NoPending, ATTACH, "S4");
    control(Break::ResetsBeforeReclaim, ATTACH, "S4");
    control(Break::ResetsBeforeReclaim, STORE, "S5");
    control(Break::LeavesWhileCopying, STORE, "S1");
}

#[test]
fn controls_of_recovering() {
    control(Break::RecoveryFreesLiving, STORE, "S1");
    control(Break::WordsBeforeOdd, HEALTH, "S6");
    control(Break::IncarnationFirst, HEALTH, "S6");
    control(Break::PlusOne, ATTACH, "S5");
    control(Break::JudgesOnce, ATTACH, "S5");
    control(Break::JudgesAnyIncarnation, ATTACH, "S6");
}

#[test]
fn controls_of_generations_and_arenas() {
    control(Break::NoGenerationCheck, LOAD_OTHERS, "S2");
    control(Break::RecyclesGenerations, LOAD_OTHERS, "S2");
    control(Break::ZeroesInPlace, COLD_LOAD, "S1");
    control(Break::ZeroesWhenNobodyWrites, COLD_LOAD, "S3");
}

/// The protocol assumes that a client's copies have ended when the kernel marks its keeper's word. Where a thread can go
/// on a little longer, an engine must wait for the process (a pidfd), not for the mark.
#[test]
fn a_mark_is_not_yet_the_end_of_a_process() {
    let lingering = Bounds { threads_linger: true, ..CONTENTION };
    caught(None, lingering, "S1");
    holds(Bounds { waits_for_process: true, ..lingering });
}

/// TIDs are unique in one PID namespace only, and the kernel knows a word's owner by its TID. A client that dies between
/// its look at an unclaimed word and its CAS takes the word from another with the same TID, who was faster. A file lock on
/// the entry helps: the kernel releases it after it has walked the robust list.
#[test]
fn a_pending_claim_names_what_may_be_anothers() {
    let equal = Bounds { equal_tids: true, ..ATTACH };
    caught(None, equal, "S4");
    holds(Bounds { claim_lock: true, ..equal });
}

/// The kernel marks what was claimed last first. So the engine claims its owner word before its other words: who finds
/// it marked finds all marked. Otherwise a new engine of the same TID (PID 1 of the next container, say) takes over words
/// that its predecessor's death still marks: it lives, and looks dead for ever.
#[test]
fn the_owner_word_is_marked_last() {
    holds(Bounds { equal_tids: true, claim_lock: true, ..STORE });
    control(Break::OwnerMarkedFirst, Bounds { equal_tids: true, ..HEALTH }, "S5");
}

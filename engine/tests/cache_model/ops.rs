//! The operations that the model test draws from.

use kvring_engine::cache::Round;
use proptest::prelude::*;

/// How many clients there are.
pub(crate) const OWNERS: u8 = 3;
/// How many namespaces there are.
pub(crate) const NAMESPACES: u32 = 4;

/// What the engine's ears say after chunks were marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listen {
    /// Whether there is anything in the rings.
    Truly,
    /// That there is, even if there is not.
    Slowly,
    /// That a scheduler cannot say what it holds.
    Never,
}

/// One operation. It may name something that does not exist.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// A scheduler looks up, and publishes that it holds what it has found, in two messages if `split` is not 0. They stay
    /// in its ring for a while if `later`.
    Find {
        owner: u8,
        session: u64,
        admission: u32,
        namespace: u32,
        chain: u64,
        len: u64,
        split: u64,
        later: bool,
    },
    /// What the engine's ears say from now on.
    Listen(Listen),
    /// All schedulers are heard, and the cache may decide about what is marked.
    Hear,
    /// The next piece of what follows from the decision.
    GoOnDropping,
    /// The cache shows everything again that is marked.
    SpareAll,
    /// A request that had to wait goes on.
    GoOnWaiting {
        which: usize,
    },
    Release {
        owner: u8,
        session: u64,
        admission: u32,
        keep: u32,
    },
    EndSession {
        owner: u8,
        session: u64,
    },
    Reserve {
        owner: u8,
        namespace: u32,
        rank: u32,
        round: Round,
        chain: u64,
        from: u64,
        len: u64,
        twice: bool,
    },
    /// All ranks reserve; then every write is committed that may be.
    Store {
        namespace: u32,
        round: Round,
        chain: u64,
        len: u64,
    },
    Commit {
        which: usize,
    },
    Recommit {
        which: usize,
    },
    Abort {
        which: usize,
    },
    /// A report that a committed shard is damaged. By `how` it comes from a client that may not say so, or names
    /// another key.
    Invalidate {
        which: usize,
        how: u8,
    },
    /// A message with a wrong owner, generation or key for a slot in use.
    Forge {
        which: usize,
        how: u8,
    },
    Gone {
        owner: u8,
        quarantine: bool,
    },
    /// A client declares what it still writes: nothing that it wrote under earlier attachments.
    QuarantineOver {
        owner: u8,
    },
    Clear {
        namespace: Option<u32>,
    },
    OutOfSpace(bool),
    Hostile {
        slot: u32,
        generation: u64,
    },
    AddSlab(u32),
    /// From now on calls that go on in pieces stop after this many records; 0: they never stop.
    Allow(u64),
    /// Does the next piece of emptying slabs.
    GoOnEmptying,
    /// Does the next piece of building the eviction order after a restart.
    GoOnPlacing,
    /// The engine dies and has a successor. `dead` has a bit for each owner that dies too; `named` says which slots
    /// the others declare.
    Restart {
        dead: u8,
        named: u64,
    },
}

/// Any operation. Those that build something up come more often than those that take it down.
pub(crate) fn op() -> impl Strategy<Value = Op> {
    let owner = 0..OWNERS;
    let namespace = 0..NAMESPACES;
    let find = (
        (owner.clone(), 0..3_u64, 0..2_u32),
        namespace.clone(),
        0..5_u64,
        0..6_u64,
        prop_oneof![2 => Just(0), 1 => 1..4_u64],
        prop::bool::weighted(0.4),
    );
    let listen = prop_oneof![3 => Just(Listen::Truly), 2 => Just(Listen::Slowly), 1 => Just(Listen::Never)];
    let round = (prop_oneof![3 => Just(0), 1 => 1..6_u32], 0..4_u32);
    let round = round.prop_map(|(source, number)| Round { source, number });
    let store = (namespace.clone(), round.clone(), 0..5_u64, 1..4_u64);
    let reserve = (
        owner.clone(),
        namespace.clone(),
        0..6_u32,
        round,
        0..5_u64,
        0..3_u64,
        1..4_u64,
        prop::bool::weighted(0.1),
    );
    prop_oneof![
        12 => find.prop_map(|((owner, session, admission), namespace, chain, len, split, later)|
            Op::Find { owner, session, admission, namespace, chain, len, split, later }),
        2 => listen.prop_map(Op::Listen),
        3 => Just(Op::Hear),
        2 => Just(Op::GoOnDropping),
        1 => Just(Op::SpareAll),
        4 => any::<usize>().prop_map(|which| Op::GoOnWaiting { which }),
        5 => store.prop_map(|(namespace, round, chain, len)| Op::Store { namespace, round, chain, len }),
        2 => (owner.clone(), 0..3_u64, 0..2_u32, 0..3_u32).prop_map(|(owner, session, admission, keep)|
            Op::Release { owner, session, admission, keep }),
        1 => (owner.clone(), 0..3_u64).prop_map(|(owner, session)| Op::EndSession { owner, session }),
        14 => reserve.prop_map(|(owner, namespace, rank, round, chain, from, len, twice)|
            Op::Reserve { owner, namespace, rank, round, chain, from, len, twice }),
        24 => any::<usize>().prop_map(|which| Op::Commit { which }),
        1 => any::<usize>().prop_map(|which| Op::Recommit { which }),
        2 => any::<usize>().prop_map(|which| Op::Abort { which }),
        2 => (any::<usize>(), 0..6_u8).prop_map(|(which, how)| Op::Invalidate { which, how }),
        2 => (any::<usize>(), 0..4_u8).prop_map(|(which, how)| Op::Forge { which, how }),
        1 => (owner.clone(), prop::bool::ANY).prop_map(|(owner, quarantine)| Op::Gone { owner, quarantine }),
        1 => owner.prop_map(|owner| Op::QuarantineOver { owner }),
        1 => prop::option::weighted(0.9, namespace).prop_map(|namespace| Op::Clear { namespace }),
        1 => prop::bool::weighted(0.3).prop_map(Op::OutOfSpace),
        1 => (any::<u32>(), any::<u64>()).prop_map(|(slot, generation)| Op::Hostile { slot, generation }),
        1 => (0..9_u32).prop_map(Op::AddSlab),
        2 => prop_oneof![1..40_u64, 40..400_u64, Just(0)].prop_map(Op::Allow),
        2 => Just(Op::GoOnEmptying),
        2 => Just(Op::GoOnPlacing),
        1 => (0..8_u8, any::<u64>(), any::<u64>()).prop_map(|(dead, one, other)| {
            // Most owners are alive, and declare most of their slots.
            Op::Restart { dead: dead & (one as u8), named: one | other }
        }),
    ]
}

//! Every place at which a test may end a process, and what leads a process there.

use kvring_shm_abi::failpoint::{Place, Rule};

/// What leads to a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// An engine that takes a dead one's segments over, and dies before it serves. After two attempts that were counted the
    /// next start is a cold one.
    Recovery {
        /// Has the attempt been counted by then?
        counted: bool,
    },
    /// An engine that has taken a dead one's segments over, and serves.
    Serving,
    /// An engine that sweeps a dead one's segments and makes new ones.
    ColdStart {
        /// Nothing has been changed by then, so that the next engine finds everything.
        untouched: bool,
    },
    /// An engine that is asked to stop, and gives everything up.
    Stop,
    /// A client, on its way up, at work, and through a restart of the engine.
    Client,
    /// Only an engine for which this rule is broken comes there.
    Broken(Rule),
}

/// A place, and one way that leads a process there.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    /// The place.
    pub place: Place,
    /// What leads there.
    pub way: Way,
    /// At which times that the process comes there the tests act on it. Each is tried.
    pub times: &'static [u32],
}

const fn visit(place: Place, way: Way, times: &'static [u32]) -> Visit {
    Visit { place, way, times }
}

const UNCOUNTED: Way = Way::Recovery { counted: false };
const COUNTED: Way = Way::Recovery { counted: true };
const COLD: Way = Way::ColdStart { untouched: false };

/// All visits. A process comes to some places only once.
pub const VISITS: &[Visit] = &[
    visit(Place::RecoveryOwner, UNCOUNTED, &[1]),
    visit(Place::RecoveryOdd, UNCOUNTED, &[1]),
    visit(Place::RecoveryCounted, COUNTED, &[1]),
    visit(Place::RecoveryWords, COUNTED, &[1]),
    visit(Place::AllocatorStarts, COUNTED, &[1]),
    visit(Place::AllocatorStarted, COUNTED, &[1]),
    visit(Place::RecoveryRecords, COUNTED, &[1]),
    visit(Place::RecoverySpan, COUNTED, &[1, 2]),
    visit(Place::RecoveryChunks, COUNTED, &[1]),
    visit(Place::RecoveryOwners, COUNTED, &[1]),
    visit(Place::ServingEven, Way::Serving, &[1]),
    visit(Place::ServingBegun, Way::Serving, &[1]),
    visit(Place::LookWord, Way::Serving, &[1, 70]),
    visit(Place::AttachAnswer, Way::Serving, &[1, 3]),
    visit(Place::AttachAnswered, Way::Serving, &[1, 4]),
    visit(Place::DeclareSlot, Way::Serving, &[1, 3]),
    visit(Place::Hold, Way::Serving, &[1, 2]),
    visit(Place::DeclareEnd, Way::Serving, &[1, 4]),
    visit(Place::DeclareEnded, Way::Serving, &[1, 3]),
    visit(Place::WritingWord, Way::Serving, &[1, 5]),
    visit(Place::WritingDone, Way::Serving, &[1, 6]),
    visit(Place::CommitWord, Way::Serving, &[1, 5]),
    visit(Place::CommitDone, Way::Serving, &[1, 6]),
    visit(Place::NamespaceEnded, Way::Serving, &[1]),
    visit(Place::NamespaceBegun, Way::Serving, &[1]),
    visit(Place::RankRegistered, Way::Serving, &[1, 2]),
    visit(Place::RankPublished, Way::Serving, &[1, 2]),
    visit(Place::SpanRecord, Way::Serving, &[1, 2]),
    visit(Place::SpanDone, Way::Serving, &[1, 2]),
    visit(Place::OrphanWord, Way::Serving, &[1, 3]),
    visit(Place::OrphanDone, Way::Serving, &[1, 4]),
    visit(Place::FreeWord, Way::Serving, &[1, 7]),
    visit(Place::FreeDone, Way::Serving, &[1, 8]),
    visit(Place::ChunkFields, Way::Serving, &[1, 4]),
    visit(Place::ChunkHint, Way::Serving, &[1, 5]),
    visit(Place::ChunkShown, Way::Serving, &[1, 6]),
    visit(Place::ChunkMarked, Way::Serving, &[1, 3]),
    visit(Place::ChunkEnds, Way::Serving, &[1, 3]),
    visit(Place::ChunkEnded, Way::Serving, &[1, 4]),
    visit(Place::SpanGone, Way::Serving, &[1]),
    visit(Place::SpanCleared, Way::Serving, &[1]),
    visit(Place::ReclaimSlots, Way::Serving, &[1, 2]),
    visit(Place::ReclaimEntry, Way::Serving, &[1, 2]),
    visit(Place::ReclaimWord, Way::Serving, &[1, 2]),
    visit(Place::ReclaimDone, Way::Serving, &[1, 2]),
    visit(Place::Opened, Way::ColdStart { untouched: true }, &[1]),
    visit(Place::PredecessorRetired, COLD, &[1]),
    visit(Place::SatellitesRetired, COLD, &[1]),
    visit(Place::LobbyGone, COLD, &[1]),
    visit(Place::PredecessorsSatellitesGone, COLD, &[1]),
    visit(Place::PredecessorGone, COLD, &[1]),
    visit(Place::Opened, COLD, &[2]),
    visit(Place::Claimed, COLD, &[1]),
    visit(Place::Allocated, COLD, &[1]),
    visit(Place::Owned, COLD, &[1]),
    visit(Place::Described, COLD, &[1]),
    visit(Place::Lobby, COLD, &[1]),
    visit(Place::Arena, COLD, &[1]),
    visit(Place::ArenaMagic, COLD, &[1]),
    visit(Place::LobbyMagic, COLD, &[1]),
    visit(Place::EngineMagic, COLD, &[1]),
    visit(Place::Retired, Way::Stop, &[1]),
    visit(Place::SatellitesRetired, Way::Stop, &[1]),
    visit(Place::LobbyGone, Way::Stop, &[1]),
    visit(Place::SatellitesGone, Way::Stop, &[1]),
    visit(Place::Unlinked, Way::Stop, &[1]),
    visit(Place::ClientClaimed, Way::Client, &[1, 2]),
    visit(Place::ClientChannel, Way::Client, &[1, 3]),
    visit(Place::ClientPublished, Way::Client, &[1, 4]),
    visit(Place::ClientAttached, Way::Client, &[1, 3]),
    visit(Place::ClientRegistered, Way::Client, &[1, 2]),
    visit(Place::ClientGranted, Way::Client, &[1, 2]),
    visit(Place::ClientCopied, Way::Client, &[1, 2]),
    visit(Place::ClientCommitSent, Way::Client, &[1, 2]),
    visit(Place::ClientTookStock, Way::Client, &[1, 2]),
    visit(Place::ClientDeclared, Way::Client, &[1, 2]),
    visit(Place::ClientEntered, Way::Client, &[1, 2]),
    visit(Place::ClientGivesUp, Way::Client, &[1, 2]),
    visit(Place::WritingFields, Way::Broken(Rule::WordLast), &[1]),
    visit(Place::RecoveryEarlyWords, Way::Broken(Rule::OddBeforeTheWords), &[1]),
    visit(Place::RequestPutOff, Way::Broken(Rule::BeginAtOnce), &[1]),
];

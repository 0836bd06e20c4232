//! Every place at which a test may end a process, and what leads there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What leads to a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// An engine that takes a dead one's segments over, and dies before it serves. Its attempt counts, or does not yet:
    /// after two that did the next start is a cold one.
    Recovery {
        /// Has the failed attempt been counted by then?
        counted: bool,
    },
    /// An engine that has taken a dead one's segments over, and serves.
    Serving,
    /// An engine that sweeps a dead one's segments and makes new ones.
    ColdStart {
        /// Nothing has been changed by then: the next engine finds everything.
        untouched: bool,
    },
    /// An engine that is asked to stop, and gives everything up.
    Stop,
    /// A client, on its way up, at work, and through a restart of the engine.
    Client,
    /// Only where the rule of this name is broken.
    Broken(&'static str),
}

/// A place, and the times at which a process comes there that are to be tried.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// As the code names it.
    pub name: &'static str,
    /// What leads there.
    pub way: Way,
    /// At which times.
    pub times: &'static [u32],
}

const fn place(name: &'static str, way: Way, times: &'static [u32]) -> Place {
    Place { name, way, times }
}

const UNCOUNTED: Way = Way::Recovery { counted: false };
const COUNTED: Way = Way::Recovery { counted: true };
const COLD: Way = Way::ColdStart { untouched: false };

/// All of them. A process passes some once only.
pub const PLACES: &[Place] = &[
    place("recovery.owner", UNCOUNTED, &[1]),
    place("recovery.odd", UNCOUNTED, &[1]),
    place("recovery.counted", COUNTED, &[1]),
    place("recovery.words", COUNTED, &[1]),
    place("allocator started", COUNTED, &[1]),
    place("recovery.span", COUNTED, &[1, 2]),
    place("recovery.chunks", COUNTED, &[1]),
    place("recovery.owners", COUNTED, &[1]),
    place("serving.even", Way::Serving, &[1]),
    place("serving.begun", Way::Serving, &[1]),
    place("look.word", Way::Serving, &[1, 70]),
    place("attach.answer", Way::Serving, &[1, 3]),
    place("attach.answered", Way::Serving, &[1, 4]),
    place("declare.slot", Way::Serving, &[1, 3]),
    place("declare.lease", Way::Serving, &[1, 2]),
    place("declare.end", Way::Serving, &[1, 4]),
    place("declare.ended", Way::Serving, &[1, 3]),
    place("writing.word", Way::Serving, &[1, 5]),
    place("writing.done", Way::Serving, &[1, 6]),
    place("commit.word", Way::Serving, &[1, 5]),
    place("commit.done", Way::Serving, &[1, 6]),
    place("namespace.ended", Way::Serving, &[1]),
    place("namespace.begun", Way::Serving, &[1]),
    place("rank.registered", Way::Serving, &[1, 2]),
    place("rank.published", Way::Serving, &[1, 2]),
    place("span.record", Way::Serving, &[1, 2]),
    place("span.done", Way::Serving, &[1, 2]),
    place("orphan.word", Way::Serving, &[1, 3]),
    place("orphan.done", Way::Serving, &[1, 4]),
    place("free.word", Way::Serving, &[1, 7]),
    place("free.done", Way::Serving, &[1, 8]),
    place("span.gone", Way::Serving, &[1]),
    place("span.cleared", Way::Serving, &[1]),
    place("reclaim.slots", Way::Serving, &[1, 2]),
    place("reclaim.entry", Way::Serving, &[1, 2]),
    place("reclaim.word", Way::Serving, &[1, 2]),
    place("reclaim.done", Way::Serving, &[1, 2]),
    place("opened", Way::ColdStart { untouched: true }, &[1]),
    place("predecessor retired", COLD, &[1]),
    place("satellites retired", COLD, &[1]),
    place("lobby gone", COLD, &[1]),
    place("predecessor's satellites gone", COLD, &[1]),
    place("predecessor gone", COLD, &[1]),
    place("opened", COLD, &[2]),
    place("claimed", COLD, &[1]),
    place("allocated", COLD, &[1]),
    place("owned", COLD, &[1]),
    place("described", COLD, &[1]),
    place("lobby", COLD, &[1]),
    place("arena", COLD, &[1]),
    place("arena magic", COLD, &[1]),
    place("lobby magic", COLD, &[1]),
    place("engine magic", COLD, &[1]),
    place("retired", Way::Stop, &[1]),
    place("satellites retired", Way::Stop, &[1]),
    place("lobby gone", Way::Stop, &[1]),
    place("satellites gone", Way::Stop, &[1]),
    place("unlinked", Way::Stop, &[1]),
    place("client.claimed", Way::Client, &[1, 2]),
    place("client.channel", Way::Client, &[1, 3]),
    place("client.published", Way::Client, &[1, 4]),
    place("client.attached", Way::Client, &[1, 3]),
    place("client.registered", Way::Client, &[1, 2]),
    place("client.granted", Way::Client, &[1, 2]),
    place("client.copied", Way::Client, &[1, 2]),
    place("client.commit sent", Way::Client, &[1, 2]),
    place("client.took stock", Way::Client, &[1, 2]),
    place("client.declared", Way::Client, &[1, 2]),
    place("client.entered", Way::Client, &[1, 2]),
    place("client.gives up", Way::Client, &[1, 2]),
    place("writing.fields", Way::Broken("word last"), &[1]),
    place("recovery.early words", Way::Broken("odd before the words"), &[1]),
    place("request.put off", Way::Broken("begin at once"), &[1]),
];

/// Every rule that a test may break. Each has a control in `tests/crash_rules.rs`, but for those of the stand-ins
/// (`tests/standins.rs`), and for the last ones, which are broken to bring about something rare: see there, in
/// `lingering.rs`, `hostile_claims.rs`, `registration.rs` and `start_errors.rs`.
pub const RULES: &[&str] = &[
    "word last",
    "generation",
    "arena id",
    "rounds",
    "rounds in a reservation",
    "regions until drained",
    "reclaim before reset",
    "odd before the words",
    "quarantine",
    "outdated claims",
    "late grants",
    "declare running copies",
    "waits for the process",
    "life lock",
    "looks at locks",
    "mark before burying",
    "reset the word",
    "begin at once",
    "memory",
    "memory for headers",
];

/// The names in calls of `call` (`failpoint::here`, say) in the product's source: all `.rs` files of the workspace but this
/// package's own.
///
/// # Panics
/// Where the source is not there.
#[must_use]
pub fn names_in_source(call: &str) -> BTreeSet<String> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = tests.parent().expect("the workspace around this package");
    let mut names = BTreeSet::new();
    let mut left: Vec<PathBuf> =
        ["shm-abi", "engine", "adapter", "gpu-kernels"].map(|part| root.join(part)).into();
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(&directory).expect("the source").flatten() {
            let path = entry.path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file");
                let opening = format!("{call}(\"");
                let after = text.split(opening.as_str()).skip(1);
                names.extend(after.filter_map(|rest| rest.split('"').next()).map(str::to_owned));
            }
        }
    }
    names
}

//! The layout hash, and the superblocks that carry it. A process with another layout hash looks at nothing else of a segment.

use crate::abi::{self, Item};
use crate::message;
use crate::superblock::{Identity, Kind, Mismatch, Superblock};

/// The descriptions of all modules that define what two processes must agree on. Their names are hashed as well: a description
/// keeps its name here when its module gets another one.
const MODULES: &[(&str, &[Item])] = &[
    ("superblock", crate::superblock::ABI),
    ("epoch", crate::epoch::ABI),
    ("life", crate::life::ABI),
    ("probe", crate::means::ABI),
    ("park", crate::park::ABI),
    ("ring", crate::ring::ABI),
    ("payload", crate::payload::ABI),
    ("slot", crate::slot::ABI),
    ("engine_segment", crate::engine_segment::ABI),
    ("lobby", crate::lobby::ABI),
    ("channel", crate::channel::places::ABI),
    ("message", message::ABI),
    ("message::words", message::words::ABI),
    ("message::record", message::record::ABI),
    ("message::request", message::request::ABI),
    ("message::completion", message::completion::ABI),
];

/// A hash of all these descriptions, [`ABI_VERSION`](crate::superblock::ABI_VERSION) among them: see [`mod@abi`].
pub const LAYOUT_HASH: u64 = {
    let mut hash = abi::Hash::new();
    let mut at = 0;
    while at < MODULES.len() {
        hash = hash.module(MODULES[at].0, MODULES[at].1);
        at += 1;
    }
    hash.0
};

/// All these descriptions in words.
#[must_use]
pub fn describe_abi() -> String {
    let mut text = format!("layout hash {LAYOUT_HASH:#018x}\n");
    for (module, items) in MODULES {
        text += &format!("\n# {module}\n");
        text.extend(items.iter().map(Item::to_string));
    }
    text
}

impl Superblock {
    /// Writes everything, the magic last.
    pub fn write(&self, identity: &Identity) {
        self.write_with(identity, LAYOUT_HASH);
    }

    /// Reads and checks everything, once; `mapped` is how many bytes of the segment are mapped.
    pub fn read(&self, kind: Kind, mapped: u64) -> Result<Identity, Mismatch> {
        self.read_with(kind, mapped, LAYOUT_HASH)
    }
}

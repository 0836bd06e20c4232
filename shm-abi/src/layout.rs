//! The layout hash, and the superblocks that carry it. A process with another layout hash looks at nothing else of a segment.

use crate::abi::{Field, Item, Message, Of, Type};
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
    ("chunk", crate::chunk::ABI),
    ("directory", crate::directory::ABI),
    ("lookup", crate::lookup::ABI),
    ("engine_segment", crate::engine_segment::ABI),
    ("lobby", crate::lobby::ABI),
    ("channel", crate::channel::places::ABI),
    ("message", message::ABI),
    ("message::words", message::words::ABI),
    ("message::record", message::record::ABI),
    ("message::request", message::request::ABI),
    ("message::completion", message::completion::ABI),
];

/// A hash of all these descriptions, [`ABI_VERSION`](crate::superblock::ABI_VERSION) among them: see [`mod@crate::abi`].
pub const LAYOUT_HASH: u64 = {
    let mut hash = Hash::new();
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

/// FNV-1a, over text and numbers.
#[derive(Clone, Copy)]
struct Hash(u64);

impl Hash {
    const fn new() -> Hash {
        Hash(0xcbf2_9ce4_8422_2325)
    }

    const fn byte(self, byte: u8) -> Hash {
        Hash((self.0 ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3))
    }

    const fn number(self, number: u64) -> Hash {
        let (mut hash, mut at) = (self, 0);
        while at < 8 {
            hash = hash.byte(number.to_le_bytes()[at]);
            at += 1;
        }
        hash
    }

    const fn text(self, text: &str) -> Hash {
        let (mut hash, mut at) = (self.number(text.len() as u64), 0);
        while at < text.len() {
            hash = hash.byte(text.as_bytes()[at]);
            at += 1;
        }
        hash
    }

    const fn of(self, of: &Type) -> Hash {
        let mut hash = self.text(of.name).number(of.size as u64).number(of.align as u64);
        let mut at = 0;
        match of.of {
            Of::Itself => {}
            Of::Many(one, count) => hash = hash.of(one).number(count as u64),
            Of::Fields(fields) => {
                while at < fields.len() {
                    let Field { name, offset, of } = fields[at];
                    hash = hash.text(name).number(offset as u64).of(of);
                    at += 1;
                }
            }
            Of::Numbers(numbers) => {
                while at < numbers.len() {
                    hash = hash.text(numbers[at].0).number(numbers[at].1);
                    at += 1;
                }
            }
        }
        hash
    }

    const fn messages(self, messages: &[Message]) -> Hash {
        let (mut hash, mut at) = (self, 0);
        while at < messages.len() {
            let Message { name, opcode, arguments } = messages[at];
            hash = hash.text(name).number(opcode as u64);
            let mut argument = 0;
            while argument < arguments.len() {
                hash = hash.text(arguments[argument].0).text(arguments[argument].1);
                argument += 1;
            }
            at += 1;
        }
        hash
    }

    /// Adds what a module defines.
    const fn module(self, name: &str, items: &[Item]) -> Hash {
        let (mut hash, mut at) = (self.text(name), 0);
        while at < items.len() {
            hash = match items[at] {
                Item::Type(of) => hash.of(of),
                Item::Number(name, number) => hash.text(name).number(number),
                Item::Messages(messages) => hash.messages(messages),
            };
            at += 1;
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! hash_of {
        ($($items:tt)*) => {{
            mod defined {
                #![allow(dead_code, reason = "it is only described")]
                use crate::sync::{AtomicU32, AtomicU64};
                crate::abi! { $($items)* }
                struct _Unused(AtomicU32, AtomicU64);
            }
            Hash::new().module("m", defined::ABI).0
        }};
    }

    #[test]
    fn every_place_and_every_number_counts() {
        let hashes = [
            hash_of! { #[repr(C)] struct Header { offset: AtomicU64, length: AtomicU64, } },
            hash_of! { #[repr(C)] struct Header { length: AtomicU64, offset: AtomicU64, } },
            hash_of! { #[repr(C)] struct Header { offset: AtomicU64, length: [AtomicU32; 2], } },
            hash_of! { #[repr(C, align(64))] struct Header { offset: AtomicU64, length: AtomicU64, } },
            hash_of! { enum Outcome: u32 { Done = 0, Gone = 1, } },
            hash_of! { enum Outcome: u32 { Done = 1, Gone = 0, } },
            hash_of! { enum Outcome: u64 { Done = 0, Gone = 1, } },
            hash_of! { enum Outcome: u32 { Done = 0, Gone = 1, Held = 2, } },
            hash_of! { const DEPTH: usize = 256; const WORDS: usize = 7; },
            hash_of! { const DEPTH: usize = 7; const WORDS: usize = 256; },
            hash_of! { const DEPTH: usize = 256; },
            hash_of! { struct Word(AtomicU64); },
            hash_of! { struct Word(AtomicU32); },
            // A change inside a type that another one contains.
            hash_of! {
                #[repr(C)] struct Inner { one: AtomicU32, other: AtomicU32, }
                #[repr(C)] struct Outer { all: [Inner; 2], }
            },
            hash_of! {
                #[repr(C)] struct Inner { other: AtomicU32, one: AtomicU32, }
                #[repr(C)] struct Outer { all: [Inner; 2], }
            },
        ];
        for (at, hash) in hashes.iter().enumerate() {
            assert_eq!(hashes.iter().position(|other| other == hash), Some(at), "{at} is as an earlier one");
        }
    }

    #[test]
    fn so_does_every_argument_of_a_message() {
        const ARGUMENTS: [&[(&str, &str)]; 4] = [
            &[("session", "u64"), ("keep", "u32")],
            &[("keep", "u32"), ("session", "u64")],
            &[("session", "u64")],
            &[("session", "u32"), ("keep", "u32")],
        ];
        let mut hashes = Vec::new();
        for arguments in ARGUMENTS {
            for opcode in [1, 2] {
                let messages: &[Message] = &[Message { name: "Release", opcode, arguments }];
                // Leaked, because descriptions are `'static`.
                let items = [Item::Messages(Vec::leak(messages.to_vec()))];
                hashes.push(Hash::new().module("m", &items).0);
            }
        }
        let all: std::collections::BTreeSet<_> = hashes.iter().collect();
        assert_eq!(all.len(), hashes.len());
    }
}

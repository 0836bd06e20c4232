//! kvring's contract in shared memory.
//!
//! Everything that an engine and its clients must agree on, and nothing else, defined in [`abi!`]: where things lie
//! ([`layout`], [`superblock`], [`engine_segment`], [`chunk`], [`directory`], [`slot`], [`namespace`], [`lobby`], [`channel`], [`text`]), how they are mapped
//! ([`segment`], [`mapping`]), how health is told ([`epoch`], [`life`], [`claims`], [`means`], [`probe`], [`process`]), and how
//! messages travel ([`ring`], [`payload`], [`message`], [`park`], [`futex`]); and how people write names
//! ([`segment::EngineName`]) and sizes ([`byte_size`]), for the engine and for the programs that start one. There is no policy
//! here, no meaning of keys, nothing of vLLM, and no allocation on any path that carries a message.
//!
//! All of it assumes a hostile peer: bounds are checked once, when a [`mapping::View`] is made; everything else is
//! read through atomics, copied out once, and validated where it is used.

pub mod abi;
pub mod byte_size;
pub mod chunk;
pub mod directory;
pub mod epoch;
pub mod failpoint;
pub mod futex;
pub mod lookup;
pub mod mapping;
pub mod namespace;
pub mod park;
pub mod payload;
pub mod ring;
pub mod slot;
pub mod sync;

#[cfg(not(loom))]
pub mod channel;
#[cfg(not(loom))]
pub mod claims;
#[cfg(not(loom))]
pub mod engine_segment;
#[cfg(not(loom))]
pub mod layout;
#[cfg(not(loom))]
pub mod life;
#[cfg(not(loom))]
pub mod lobby;
#[cfg(not(loom))]
mod lock;
#[cfg(not(loom))]
pub mod means;
#[cfg(not(loom))]
pub mod message;
#[cfg(not(loom))]
pub mod probe;
#[cfg(not(loom))]
pub mod process;
#[cfg(not(loom))]
pub mod segment;
#[cfg(not(loom))]
pub mod superblock;
#[cfg(not(loom))]
pub mod text;

//! The workload: conversations, of which several begin alike, and each request is a turn of one of them.

use kvring_adapter::Key;
use kvring_rig::pages::Shape;
use kvring_rig::random::Random;
use kvring_rig::random::mix;
use serde::{Deserialize, Serialize};

/// Chunks at the beginning that all conversations of a family share: a system prompt.
const SHARED: u32 = 4;
/// Families.
const FAMILIES: u32 = 6;
/// Chunks of the longest turn.
const LONGEST: u32 = 24;
/// Conversations of a phase. All their chunks fit into a roomy arena.
const CONVERSATIONS: u32 = 60;
/// Conversations that go on at the same time.
const AT_ONCE: u32 = 20;
/// Requests after which one of those ends, and another begins.
const REQUESTS_EACH: u32 = 20;

/// One rank's paged KV cache.
pub(super) const SHAPE: Shape =
    Shape { planes: 4, page_bytes: [8192; 2], gap_bytes: 0, blocks_per_chunk: 2, blocks: 768 };
/// Tokens of a chunk.
pub(super) const CHUNK_TOKENS: u32 = 64;

/// The first part of a conversation: the prompt of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Turn {
    /// Of which phase.
    pub(crate) phase: u32,
    /// Of which conversation.
    pub(crate) conversation: u32,
    /// Chunks.
    pub(crate) chunks: u32,
}

impl Turn {
    /// Any turn that may come after so many requests.
    pub(crate) fn random(random: &mut Random, phase: u32, requests: u32) -> Turn {
        let first = requests / REQUESTS_EACH;
        let conversation = (first + random.of(0..AT_ONCE.into()) as u32) % CONVERSATIONS;
        Turn { phase, conversation, chunks: random.of(1..u64::from(LONGEST) + 1) as u32 }
    }

    /// The last turns of all conversations that went on in this many requests.
    pub(crate) fn all(phase: u32, requests: u32) -> impl Iterator<Item = Turn> {
        let reached = (requests / REQUESTS_EACH + AT_ONCE).min(CONVERSATIONS);
        (0..reached).map(move |conversation| Turn { phase, conversation, chunks: LONGEST })
    }

    /// Its keys: each names its whole prefix.
    pub(crate) fn keys(&self, seed: u64) -> Vec<Key> {
        let Turn { phase, conversation, chunks } = *self;
        let salt = mix(seed ^ mix(u64::from(phase) + 1));
        let key = |index| {
            let family = index < SHARED;
            let whose = if family { conversation % FAMILIES } else { FAMILIES + conversation };
            [mix(salt ^ u64::from(whose)), u64::from(index) + 1]
        };
        (0..chunks).map(key).collect()
    }
}

/// Bytes of all chunks that a phase can ever store, all ranks together.
#[cfg(test)]
fn bytes_of_all(ranks: u64) -> u64 {
    let chunks = FAMILIES * SHARED + CONVERSATIONS * (LONGEST - SHARED);
    u64::from(chunks) * SHAPE.shard_bytes() * ranks
}

#[cfg(test)]
mod tests {
    use super::super::plan::{RANKS, phases};
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn conversations_of_a_family_begin_alike_and_part() {
        let turn = |phase, conversation| Turn { phase, conversation, chunks: LONGEST }.keys(7);
        let (one, same, other) = (turn(0, 1), turn(0, 1 + FAMILIES), turn(0, 2));
        assert_eq!(one[..4], same[..4]);
        let keys: HashSet<Key> = one.iter().chain(&same).chain(&other).chain(&turn(1, 1)).copied().collect();
        assert_eq!(keys.len() as u32, 4 * LONGEST - SHARED);
        assert_eq!(Turn { phase: 0, conversation: 1, chunks: 3 }.keys(7), one[..3]);
    }

    #[test]
    fn a_roomy_arena_holds_everything_with_room_for_rounds_side_by_side() {
        let all = bytes_of_all(RANKS.into());
        for phase in phases(11, 2000) {
            assert_eq!(phase.roomy, phase.arena_bytes >= all * 5 / 4, "{phase:?}, {all} bytes");
            assert!(!phase.roomy || phase.client_share == 100, "one client may lease everything");
        }
    }
}

//! The blocks of a simulated paged KV cache, given out as vLLM's block pool does it: any free block will do.

use anyhow::bail;
use std::collections::VecDeque;

/// Free blocks; the one that has been free for longest is given out first.
#[derive(Debug)]
pub struct BlockPool {
    free: VecDeque<u32>,
}

impl BlockPool {
    /// A pool in which all blocks are free. Their order is not that of their ids, so that the pages of a shard are never one
    /// run of memory.
    #[must_use]
    pub fn new(blocks: u32) -> BlockPool {
        let (even, odd) = ((0..blocks).step_by(2), (1..blocks).step_by(2));
        BlockPool { free: odd.rev().chain(even).collect() }
    }

    /// Takes the blocks of so many chunks.
    ///
    /// # Errors
    /// Fewer blocks are free.
    pub fn take(&mut self, chunks: usize, blocks_per_chunk: u32) -> anyhow::Result<Vec<Vec<u32>>> {
        let wanted = chunks * blocks_per_chunk as usize;
        if wanted > self.free.len() {
            bail!("expected at most {} free blocks to be asked for, got {wanted}", self.free.len());
        }
        Ok((0..chunks).map(|_| self.free.drain(..blocks_per_chunk as usize).collect()).collect())
    }

    /// Gives blocks back.
    pub fn give(&mut self, blocks: Vec<Vec<u32>>) {
        self.free.extend(blocks.into_iter().flatten());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_block_is_given_once_and_comes_back() {
        let mut pool = BlockPool::new(9);
        let first = pool.take(2, 4).unwrap();
        let ids: BTreeSet<u32> = first.iter().flatten().copied().collect();
        assert_eq!((first.len(), ids.len()), (2, 8));
        let error = pool.take(1, 4).unwrap_err().to_string();
        assert_eq!(error, "expected at most 1 free blocks to be asked for, got 4");
        pool.give(first);
        assert_eq!(pool.take(9, 1).unwrap().into_iter().flatten().collect::<BTreeSet<_>>().len(), 9);
    }
}

//! Random caches in vLLM's page orders, and a plain reference of what the kernels must do to them.

use crate::shim::{Shape as Grid, Shim};
use crate::support::pages::{Group, ORDERS, Piece, Shape, chunks, pieces};
use crate::support::random::Random;
use kvring_gpu_kernels::{PagedKv, TILE_BYTES, Tiles, Window, checksum};
use std::collections::BTreeMap;
use std::ops::Range;

/// The number of cases: every order with every width, fifteen times.
pub(crate) const CASES: u64 = 15 * (ORDERS.len() * WIDTHS.len()) as u64;

/// Bytes of the guards around memory and in its gaps, which nobody may touch.
const GUARD: usize = 256;
const WIDTHS: [usize; 3] = [16, 8, 4];

/// Memory that begins at a multiple of 16.
#[derive(Clone)]
struct Memory {
    words: Vec<u128>,
}

impl Memory {
    fn random(bytes: usize, rng: &mut Random) -> Memory {
        let mut memory = Memory { words: vec![0; bytes.div_ceil(16)] };
        rng.fill(memory.bytes_mut());
        memory
    }

    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.words)
    }

    /// The address through which kernels read and write.
    fn address(&mut self) -> u64 {
        self.words.as_mut_ptr() as u64
    }
}

/// Limits for a case with kernels of this width: many positions, or large pages, or neither.
fn shape(rng: &mut Random, width: usize) -> Shape {
    let shape = Shape { unit: width, blocks: (1, 7), far: true, ..Shape::SMALL };
    match rng.bits() % 12 {
        0 => Shape {
            content: 2,
            tokens: 2,
            layers: 2,
            blocks: (520, 700),
            per_chunk: (513, 1100),
            groups: 1,
            ..shape
        },
        1 | 2 => Shape { content: 64, tokens: 48, ..shape },
        _ => shape,
    }
}

struct Case {
    rng: Random,
    groups: Vec<Group>,
    memory: Memory,
    /// The width of the kernels that it is run with.
    width: usize,
    tiles: Tiles,
    windows: Vec<Window>,
    /// Does every window have memory of its own?
    staged: bool,
    shard_bytes: usize,
}

impl Case {
    fn new(seed: u64) -> Result<Case, String> {
        let mut rng = Random::new(seed.wrapping_mul(0xd134_2543_de82_ef95), 0);
        let kinds = seed as usize % (ORDERS.len() * WIDTHS.len());
        let (order, width) = (kinds % ORDERS.len(), WIDTHS[kinds / ORDERS.len()]);
        let shape = shape(&mut rng, width);
        let (mut groups, mut end) = (Vec::new(), GUARD);
        for index in 0..rng.within(1, shape.groups) {
            let order = if index == 0 { order } else { rng.within(0, ORDERS.len() - 1) };
            let begin = end + width * rng.within(0, 4);
            let (group, next) = Group::new(&mut rng, order, shape, begin);
            groups.push(group);
            end = next + GUARD;
        }
        let mut memory = Memory::random(end, &mut rng);
        let address = memory.address();
        // SAFETY: nobody copies by this description.
        let kv = unsafe {
            PagedKv::grouped(groups.iter().map(|group| group.described(address)).collect()).unwrap()
        };
        let tiles = Tiles::of(&kv).map_err(|error| error.to_string())?;
        let divides = |width: &usize| {
            let mut planes = kv.groups().iter().flat_map(|group| &group.planes);
            planes.all(|plane| {
                [plane.base as usize, plane.block_stride, plane.page_bytes]
                    .iter()
                    .all(|n| n.is_multiple_of(*width))
            })
        };
        let widest = WIDTHS.into_iter().find(divides).unwrap();
        if tiles.vector() as usize != widest {
            return Err(format!("expected vectors of {widest} bytes, got {}", tiles.vector()));
        }
        // Narrower kernels must copy it as well.
        let width = if rng.one_in(3) { widest.min(WIDTHS[rng.within(1, 2)]) } else { widest };
        let shard_bytes = kv.shard_bytes() as usize;
        let longest = tiles.table().iter().map(|tile| tile.bytes).max().unwrap();
        // As short as possible, but not so short that many windows take long.
        let max_bytes = match rng.bits() % 3 {
            0 => longest.max(shard_bytes as u32 / 16),
            1 => rng.within(longest.max(shard_bytes as u32 / 16) as usize, shard_bytes) as u32,
            _ => shard_bytes as u32,
        };
        let windows = tiles.windows(max_bytes).map_err(|error| error.to_string())?;
        let mut at = (0, 0);
        for window in &windows {
            if (window.first, window.offset) != at || window.bytes > max_bytes || window.positions > 512 {
                return Err(format!("expected a window of {max_bytes} bytes from {at:?} on, got {window:?}"));
            }
            at = (window.first + window.count, window.offset + window.bytes);
        }
        if at != (tiles.table().len() as u32, shard_bytes as u32) || longest > TILE_BYTES {
            return Err(format!("expected windows up to {shard_bytes} bytes, got up to {at:?}"));
        }
        let staged = rng.one_in(2);
        Ok(Case { rng, groups, memory, width, tiles, windows, staged, shard_bytes })
    }

    fn grid(&mut self) -> Grid {
        let warps = if self.rng.one_in(40) { 32 } else { self.rng.within(1, 6) };
        Grid { grid: self.rng.within(1, 5) as u32, block: 32 * warps as u32 }
    }

    /// The blocks of a chunk: distinct ones, or any, with SKIP among them or without.
    fn chunk(&mut self, distinct: bool, skips: bool) -> Vec<u32> {
        let rng = &mut self.rng;
        chunks(&self.groups, 1, |group, count| match distinct {
            true => group.distinct(rng, count),
            false => group.any(rng, count, skips),
        })
        .remove(0)
    }

    /// Memory with guards around it for the whole shard, or for one window alone.
    fn shard(&mut self, window: &Window) -> Shard {
        let (offset, bytes) = match self.staged {
            true => (window.offset as usize, window.bytes as usize),
            false => (0, self.shard_bytes),
        };
        let begin = GUARD + self.width * self.rng.within(0, 3);
        Shard { memory: Memory::random(begin + bytes + GUARD, &mut self.rng), begin, offset }
    }

    /// Allows a launch for `window` the memory that it may touch.
    fn allow(&mut self, shim: &Shim, window: &Window, shard: &mut Shard, pieces: &[Piece]) {
        let positions = window.first_position as usize..(window.first_position + window.positions) as usize;
        let memory = self.memory.address() as usize;
        let pages = pieces.iter().filter(|piece| positions.contains(&piece.position));
        let mut ranges: Vec<_> =
            pages.filter_map(|piece| piece.at.map(|at| [memory + at, piece.bytes])).collect();
        ranges.push([shard.address().wrapping_add(u64::from(window.offset)) as usize, window.bytes as usize]);
        shim.allow(&ranges);
    }

    fn gather(&mut self, shim: &Shim) -> Result<(), String> {
        let skips = self.rng.one_in(4);
        let chunk = self.chunk(false, skips);
        let (pieces, before) = (pieces(&self.groups, &chunk), self.memory.clone());
        let kernel = format!("kv_gather_{}", self.width);
        for window in self.windows.clone() {
            let (mut shard, grid) = (self.shard(&window), self.grid());
            let mut expected = shard.clone();
            for piece in &pieces {
                let Some(at) = piece.at else { continue };
                let page = &before.bytes()[at..at + piece.bytes];
                expected.put(piece.offset, page, &window);
            }
            self.allow(shim, &window, &mut shard, &pieces);
            // SAFETY: memory of this case.
            unsafe {
                shim.copy(&kernel, grid, self.tiles.table(), &window, shard.address(), &chunk)?;
            }
            moved_once(shim, &pieces, &window)?;
            same(&format!("{kernel} {grid:?} {window:?}: the shard"), &expected.memory, &shard.memory)?;
        }
        same(&format!("{kernel}: the pages"), &before, &self.memory)
    }

    fn scatter(&mut self, shim: &Shim) -> Result<(), String> {
        let chunk = self.chunk(true, true);
        let (pieces, mut expected) = (pieces(&self.groups, &chunk), self.memory.clone());
        let kernel = format!("kv_scatter_{}", self.width);
        for window in self.windows.clone() {
            let (mut shard, grid) = (self.shard(&window), self.grid());
            let before = shard.clone();
            for piece in &pieces {
                let Some(at) = piece.at else { continue };
                let page = &mut expected.bytes_mut()[at..at + piece.bytes];
                shard.take(piece.offset, page, &window);
            }
            self.allow(shim, &window, &mut shard, &pieces);
            // SAFETY: memory of this case; no block comes twice.
            unsafe {
                shim.copy(&kernel, grid, self.tiles.table(), &window, shard.address(), &chunk)?;
            }
            moved_once(shim, &pieces, &window)?;
            same(&format!("{kernel} {grid:?} {window:?}: the pages"), &expected, &self.memory)?;
            same(&format!("{kernel} {grid:?} {window:?}: the shard"), &before.memory, &shard.memory)?;
        }
        Ok(())
    }

    fn checksum(&mut self, shim: &Shim, paged: bool) -> Result<(), String> {
        let chunk = self.chunk(false, true);
        let pieces = pieces(&self.groups, &chunk);
        let (kernel, before) = (format!("kv_checksum_{}", self.width), self.memory.clone());
        // The bytes that are summed: those of the pages if `paged`; those of the shard for skipped blocks, or if not.
        let mut contents = vec![0; self.shard_bytes];
        let mut sum = 0u64;
        for window in self.windows.clone() {
            let (mut shard, grid) = (self.shard(&window), self.grid());
            let untouched = shard.clone();
            shard.take(0, &mut contents, &window);
            self.allow(shim, &window, &mut shard, if paged { &pieces } else { &[] });
            // SAFETY: memory of this case.
            let part = unsafe {
                let (tiles, address) = (self.tiles.table(), shard.address());
                shim.checksum((&kernel, grid), tiles, &window, address, &chunk, paged)?
            };
            sum = sum.wrapping_add(part);
            same(&format!("{kernel} {grid:?} {window:?}: the shard"), &untouched.memory, &shard.memory)?;
        }
        let mut expected = 0u64;
        for piece in &pieces {
            let bytes = match piece.at {
                Some(at) if paged => &before.bytes()[at..at + piece.bytes],
                _ => &contents[piece.offset..piece.offset + piece.bytes],
            };
            expected = expected.wrapping_add(checksum::part(bytes, piece.offset as u64));
        }
        let all = self.shard_bytes as u64;
        let (expected, sum) = (checksum::finish(expected, all), checksum::finish(sum, all));
        if sum != expected {
            return Err(format!("{kernel}, paged {paged}: expected {expected:#018x}, got {sum:#018x}"));
        }
        same(&format!("{kernel}: the pages"), &before, &self.memory)
    }
}

/// Memory that holds a shard, or a part of it from byte `offset` on, at `begin`.
#[derive(Clone)]
struct Shard {
    memory: Memory,
    begin: usize,
    offset: usize,
}

impl Shard {
    /// The address at which byte 0 of the shard would be.
    fn address(&mut self) -> u64 {
        (self.memory.address() + self.begin as u64).wrapping_sub(self.offset as u64)
    }

    /// Writes the part of `bytes`, which begin at `offset` of the shard, that lies in `window`.
    fn put(&mut self, offset: usize, bytes: &[u8], window: &Window) {
        if let Some((here, there)) = self.part(offset, bytes.len(), window) {
            self.memory.bytes_mut()[here].copy_from_slice(&bytes[there]);
        }
    }

    /// Reads the part of `bytes`, which begin at `offset` of the shard, that lies in `window`.
    fn take(&self, offset: usize, bytes: &mut [u8], window: &Window) {
        if let Some((here, there)) = self.part(offset, bytes.len(), window) {
            bytes[there].copy_from_slice(&self.memory.bytes()[here]);
        }
    }

    /// Where the part that lies in `window` is in this memory, and where it is among the bytes from `offset` on.
    fn part(&self, offset: usize, bytes: usize, window: &Window) -> Option<(Range<usize>, Range<usize>)> {
        let (from, to) = overlap(offset, bytes, window);
        let at = |byte: usize| self.begin + byte - self.offset;
        (from < to).then(|| (at(from)..at(to), from - offset..to - offset))
    }
}

/// Checks that no byte was moved twice, which would give the right bytes, but slowly.
fn moved_once(shim: &Shim, pieces: &[Piece], window: &Window) -> Result<(), String> {
    let there = pieces.iter().filter(|piece| piece.at.is_some());
    let overlaps = there.map(|piece| overlap(piece.offset, piece.bytes, window));
    let bytes: usize = overlaps.map(|(from, to)| to.saturating_sub(from)).sum();
    match shim.moved() {
        moved if moved == 2 * bytes => Ok(()),
        moved => Err(format!("expected {bytes} bytes loaded and stored once, got {moved} in all")),
    }
}

fn overlap(offset: usize, bytes: usize, window: &Window) -> (usize, usize) {
    let (begin, end) = (window.offset as usize, (window.offset + window.bytes) as usize);
    (offset.max(begin), (offset + bytes).min(end))
}

fn same(what: &str, expected: &Memory, got: &Memory) -> Result<(), String> {
    if expected.words == got.words {
        return Ok(());
    }
    let (expected, got) = (expected.bytes(), got.bytes());
    let at = expected.iter().zip(got).position(|(a, b)| a != b).unwrap_or(0);
    let wrong = expected.iter().zip(got).filter(|(a, b)| a != b).count();
    Err(format!(
        "{what}: {wrong} of {} bytes are wrong; at {at} expected {:#04x}, got {:#04x}",
        got.len(),
        expected[at],
        got[at]
    ))
}

/// Counts in how many cases each thing occurs that the cases are there for.
pub(crate) fn coverage() -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for case in (0..CASES).map(|seed| Case::new(seed).unwrap()) {
        let mut count = |what: String| *counts.entry(what).or_default() += 1;
        let width = case.width;
        let pages = |long: fn(&usize) -> bool| {
            case.groups.iter().flat_map(|group| &group.planes).any(|laid| long(&laid.page))
        };
        let any = |holds: fn(&Group) -> bool| case.groups.iter().any(holds);
        let yes = [
            (case.groups[0].order, true),
            ("pages of several tiles", pages(|page| *page > TILE_BYTES as usize)),
            ("pages of less than a round", pages(|page| *page < 32 * 4)),
            ("several groups", case.groups.len() > 1),
            ("far blocks", any(|group| group.lowest > 0)),
            ("more positions than a launch takes", any(|group| group.per_chunk > 512)),
            ("several windows", case.windows.len() > 1),
            ("windows in memory of their own", case.staged),
            ("tiles at half words", case.tiles.table().iter().any(|tile| tile.offset % 8 != 0)),
        ];
        for (what, _) in yes.into_iter().filter(|(_, yes)| *yes) {
            count(format!("{what}, width {width}"));
        }
    }
    counts
}

/// Runs one case. Its error says what went wrong, and how to see it again.
pub(crate) fn run(seed: u64, shim: &Shim) -> Result<(), String> {
    let mut orders = Vec::new();
    let outcome = Case::new(seed).and_then(|mut case| {
        orders = case.groups.iter().map(|group| group.order).collect();
        case.gather(shim)?;
        case.checksum(shim, true)?;
        case.checksum(shim, false)?;
        case.scatter(shim)
    });
    outcome.map_err(|error| format!("case {seed} ({}): {error}", orders.join(", ")))
}

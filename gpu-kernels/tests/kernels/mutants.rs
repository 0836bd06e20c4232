//! Kernels that are wrong in one place each. Every mutant runs in a process of its own: if it crashes, it counts as noticed.

use crate::{LIBRARY, shim};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

/// For each mutant: its name, the text that is replaced, and the text that replaces it.
const MUTANTS: &[(&str, &str, &str)] = &[
    ("stride of 32 bits", "static_cast<u64>(block) * tile.stride", "block * static_cast<u32>(tile.stride)"),
    ("position without the window's first", "tile.position - blocks.first", "tile.position"),
    ("block ids by the wrong field", "blocks.id[tile.position -", "blocks.id[tile.reserved -"),
    (
        "copy: the window's first tile ignored",
        "tiles[first + at];\n        const u32 block",
        "tiles[at];\n        const u32 block",
    ),
    (
        "checksum: the window's first tile ignored",
        "tiles[first + at];\n        u64",
        "tiles[at];\n        u64",
    ),
    ("copy: SKIP ignored", "if (block == SKIP) continue;", ""),
    ("checksum: SKIP ignored", "if (block != SKIP) from =", "from ="),
    ("checksum: always from pages", "if (paged != 0) {", "{"),
    ("checksum: never from pages", "if (paged != 0) {", "if (false) {"),
    ("lanes a wide vector apart", "const u32 step = WARP * V;", "const u32 step = WARP * 16;"),
    (
        "half a warp: everything is moved twice",
        "const u32 step = WARP * V;",
        "const u32 step = WARP / 2 * V;",
    ),
    (
        "copy: a round's first vector only",
        "k < in_flight; k++) store<Vector, to_page>(to + at + k * step, held[k]);",
        "k < in_flight; k++) store<Vector, to_page>(to + at + k * step, held[0]);",
    ),
    (
        "checksum: a round's indices all the same",
        "k < in_flight; k++) sum += held[k].sum(index + (at + k * step) / 8);",
        "k < in_flight; k++) sum += held[k].sum(index + at / 8);",
    ),
    (
        "copy: blocks of the grid do the same",
        "at < count; at += warps_of_grid()) {\n        const Tile tile = tiles[first + at];\n        const u32 block",
        "at < count; at += 1) {\n        const Tile tile = tiles[first + at];\n        const u32 block",
    ),
    ("copy: one vector too many", "if (at + k * step < bytes) store<", "if (at + k * step <= bytes) store<"),
    (
        "copy: the last vector not read",
        "if (at + k * step < bytes) held[k] = load<Vector>",
        "if (at + k * step + V < bytes) held[k] = load<Vector>",
    ),
    ("copy: vectors wider than promised", "copy<V, false>(here, page,", "copy<16, false>(here, page,"),
    ("scatter the wrong way round", "copy<V, true>(page, here,", "copy<V, true>(here, page,"),
    ("shard without offset", "const u64 here = shard + tile.offset;", "const u64 here = shard;"),
    (
        "offset of the window lost above 32 bits",
        "u64 from = shard + tile.offset;",
        "u64 from = static_cast<u32>(shard) + tile.offset;",
    ),
    ("blocks of the grid do the same", "gridDim.x * (blockDim.x / WARP)", "(blockDim.x / WARP)"),
    ("barrier missing", "    __syncthreads();\n", ""),
    ("barrier of some warps", "    __syncthreads();\n", "    if (threadIdx.x < WARP) __syncthreads();\n"),
    ("reduction without its first step", "distance = WARP / 2;", "distance = WARP / 4;"),
    ("shuffle without a lane", "#define ALL_LANES 0xffffffffu", "#define ALL_LANES 0x7fffffffu"),
    ("warps that are not there summed", "lane() < blockDim.x / WARP ? sums[lane()] : 0", "sums[lane()]"),
    ("no sum, nothing written", "if (lane() == 0) partial", "if (lane() == 0 && sum != 0) partial"),
    ("head bytes missing", "if (head != 0 && lane() < 4)", "if (false)"),
    ("tail bytes missing", "if (tail != 0 && lane() < 4)", "if (false)"),
    (
        "tail at the wrong position",
        "static_cast<u64>(offset) + bytes + lane()",
        "static_cast<u64>(offset) + lane()",
    ),
    ("rotate missing", "(odd << 31 | odd >> 33)", "odd"),
    ("single byte without its one", "(static_cast<u64>(value) + 1)", "static_cast<u64>(value)"),
    ("key not bent", "x ^ (x >> 15)", "x"),
    ("halves not swapped", "static_cast<u64>(low) << 32 | high", "static_cast<u64>(high) << 32 | low"),
    ("index without the tile's place", "const u32 index = offset / 8;", "const u32 index = 0;"),
    ("second word at the first one's index", "word(index + 1, v.z, v.w)", "word(index, v.z, v.w)"),
    (
        "checksum: last words not read",
        "if (at + k * step < bytes) held[k].read",
        "if (at + k * step + 8 < bytes) held[k].read",
    ),
];

/// Fails unless the cases notice every mutant.
pub(crate) fn all() {
    let original = std::fs::read_to_string(shim::cuda().join("kv.cu")).unwrap();
    let scratch = shim::scratch().join("mutants");
    std::fs::create_dir_all(&scratch).unwrap();
    let left = Mutex::new(MUTANTS.iter().enumerate());
    let unnoticed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((index, mutant)) = left.lock().unwrap().next() else { return };
                    if let Err(why) = one(&original, &scratch, index, mutant) {
                        unnoticed.lock().unwrap().push(why);
                    }
                }
            });
        }
    });
    let unnoticed = unnoticed.into_inner().unwrap();
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n"));
}

fn one(
    original: &str,
    scratch: &Path,
    index: usize,
    &(name, from, to): &(&str, &str, &str),
) -> Result<(), String> {
    let places = original.matches(from).count();
    if places != 1 {
        return Err(format!("mutant `{name}`: expected `{from}` once in kv.cu, got it {places} times"));
    }
    let source = scratch.join(format!("{index}.cu"));
    let library = source.with_extension("so");
    std::fs::write(&source, original.replace(from, to)).map_err(|error| error.to_string())?;
    shim::build(&source, "-O1", &library);
    let ran = Command::new(std::env::current_exe().map_err(|error| error.to_string())?)
        .args(["--exact", "every_case_is_bit_exact"])
        .env(LIBRARY, &library)
        .output()
        .map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&ran.stdout);
    // Only the failure of a case counts, or a crash.
    match ran.status.code() {
        Some(0) => Err(format!("mutant `{name}`: no case noticed")),
        Some(_) if !said.contains("\ncase ") => Err(format!("mutant `{name}`: no case failed, but:\n{said}")),
        _ => Ok(()),
    }
}

//! `kvring bench health`: the costs of a death, of an engine's and of a client's.
//!
//! An engine that is killed under a caller that sleeps for its answer, and under a client that does nothing; a
//! successor that starts on the segments of the dead one; a client that is killed with leases and half-written slots. Each
//! time stands beside the time that the kernel itself takes for the same, measured in between: a robust futex and one sleeper, a
//! process that does nothing, a plain read of the chunk records and slot headers.

pub(crate) mod bare;
pub(crate) mod holder;
mod life;
mod notice;
mod print;
mod reclaim;
mod restart;

use crate::cores::{self, Pair};
use crate::report::How;
use crate::stats::Samples;
use kvring_engine::byte_size::ByteSize;
use kvring_engine::preflight::Room;
use std::time::Duration;

/// The arguments of `kvring bench health`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Examples:
  kvring bench health                       everything, in less than three minutes
  kvring bench health --json                one JSON object; each name ends with its unit
  kvring bench health --only restart        how soon a successor serves, and nothing else
  kvring bench health --arena 64GiB         is a large engine's death noticed later? (no)

Numbers without a value (-, null) could not be measured: no store was through after a
restart, or --only left them out.
It needs room in /dev/shm for one arena of 5 GiB; with less the arenas are smaller,
or a part is left out, and the output says so.")]
pub struct HealthArgs {
    /// Arena of the engines that are killed under a caller; smaller where there is no room for it
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize(4 << 30))]
    arena: ByteSize,

    /// Kills of each kind, for the percentiles; of engines with the whole arena as many as --seconds allow
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    kills: u32,

    /// How long to kill engines with the whole arena: each is allocated first, at a GiB a second or less
    #[arg(long, value_name = "S", default_value_t = 45, value_parser = clap::value_parser!(u64).range(..=86_400))]
    seconds: u64,

    /// Measure only these, instead of everything
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<Part>,
}

/// The parts that can be measured alone.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// How soon an engine's death is noticed.
    Notice,
    /// How soon its successor serves.
    Restart,
    /// How soon a client's death is undone.
    Reclaim,
}

impl HealthArgs {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// An arena in which deaths are cheap to repeat.
const SMALL_ARENA: u64 = 64 << 20;
/// Chunks that a successor finds.
const FEW: u32 = 100_000;
/// Many of them.
const MANY: u32 = 1_000_000;
/// How long restarts with one number of chunks go on.
const RESTARTS_FOR: Duration = Duration::from_secs(20);

/// Everything that was measured; `None` where it was not asked for, or there was no room.
struct Measured {
    /// Before the run.
    load_average: Option<f64>,
    arena_bytes: u64,
    /// Kills under a sleeping caller, of engines with the whole arena.
    large: Option<notice::Notices>,
    /// Kills of engines with a small arena.
    small: Option<notice::Small>,
    restarts_wanted: bool,
    few: Option<restart::Restarts>,
    many: Option<restart::Restarts>,
    reclaim: Option<reclaim::Reclaims>,
}

pub(crate) fn run(how: How, args: &HealthArgs) -> anyhow::Result<()> {
    let pair = Pair::choose()?;
    let about = pair.describe();
    let kills = args.kills as usize;
    let arena_bytes = fitting(args.arena.0, SMALL_ARENA, &Room::now());
    let mut parts = 0;
    parts += if args.wants(Part::Notice) { 3 * kills } else { 0 };
    parts += if args.wants(Part::Restart) { 2 * (how.windows + 1) } else { 0 };
    parts += if args.wants(Part::Reclaim) { kills } else { 0 };
    let bar = how.bar(parts);
    let mut measured = Measured {
        load_average: cores::load_average(),
        arena_bytes,
        large: None,
        small: None,
        restarts_wanted: args.wants(Part::Restart),
        few: None,
        many: None,
        reclaim: None,
    };
    if args.wants(Part::Notice) {
        measured.small = Some(notice::small(SMALL_ARENA, kills, &pair, &bar)?);
        let budget = Duration::from_secs(args.seconds);
        measured.large = Some(notice::large(arena_bytes, kills, budget, &pair, &bar)?);
    }
    if args.wants(Part::Reclaim) {
        measured.reclaim = Some(reclaim::measure(kills, &bar)?);
    }
    if args.wants(Part::Restart) {
        measured.few = restart::measure(FEW, how.windows, RESTARTS_FOR, &bar)?;
        measured.many = restart::measure(MANY, how.windows, RESTARTS_FOR, &bar)?;
    }
    bar.finish_and_clear();
    print::print(how, measured, about)
}

/// The arena that is wanted, or a smaller one that there is room for. Some room is left for everybody else.
fn fitting(wanted: u64, least: u64, room: &Room) -> u64 {
    let left = room.tightest().usable();
    wanted.min((left / 10 * 9) & !(least - 1)).max(least)
}

/// Times of one kind, in nanoseconds.
#[derive(Clone, Debug, Default)]
struct Times {
    samples: Samples,
    count: usize,
}

impl Times {
    fn push(&mut self, ns: u64) {
        self.samples.push(ns);
        self.count += 1;
    }

    /// A percentile, in units of `unit_ns`; not a number where there are no times.
    fn at(&mut self, share: f64, unit_ns: f64) -> f64 {
        self.samples.percentile(share).map_or(f64::NAN, |ns| ns as f64 / unit_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_that_does_not_fit_gets_smaller_in_whole_steps() {
        let room = |shm_free| Room { shm_total: 1 << 40, shm_free, memory: None, cgroup: None, stale: 0 };
        assert_eq!(fitting(4 << 30, SMALL_ARENA, &room(24 << 30)), 4 << 30);
        let less = fitting(4 << 30, SMALL_ARENA, &room(3 << 30));
        assert!(less < 3 << 30 && less > 2 << 30 && less.is_multiple_of(SMALL_ARENA), "{less}");
        assert_eq!(
            fitting(4 << 30, SMALL_ARENA, &room(1 << 20)),
            SMALL_ARENA,
            "the start says what is missing"
        );
    }

    #[test]
    fn times_are_told_in_their_unit() {
        let mut times = Times::default();
        assert!(times.at(0.5, 1e3).is_nan());
        [1_000, 2_000, 3_000].into_iter().for_each(|ns| times.push(ns));
        assert_eq!((times.at(0.5, 1e3), times.at(0.99, 1e3), times.count), (2.0, 3.0, 3));
    }
}

//! `kvring bench engine`: the costs of the engine itself.

use crate::child::{self, Child, Engine, Job, Placement};
use crate::clock::{Clock, process_cpu_ns};
use crate::cores::Pair;
use crate::lookup::fill::Chains;
use crate::lookup::filled_engine;
use crate::report::{How, Sheet, number, rounded};
use crate::stats::Windows;
use crate::turn;
use anyhow::Context;
use kvring_adapter::Role;
use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_rig::pipe::Pipe;
use kvring_shm_abi::futex::{self, Deadline, monotonic_ns};
use kvring_shm_abi::sync::AtomicU32;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The arena of the engines that are started: large enough that allocating it all would take seconds.
const ARENA: u64 = 4 << 30;
/// How long the engine idles in one window.
const IDLE: Duration = Duration::from_millis(300);
/// Health checks of one window.
const CHECKS: u32 = 1_000_000;
/// Engines whose longest turn is measured: the median of them is shown.
const FLOODS: usize = 5;
/// The index sizes between which the bytes of a chunk are counted.
const FEW: u32 = 10_000;
const MANY: u32 = 1_000_000;

/// One row of `--json`.
#[derive(Serialize)]
struct Row {
    name: &'static str,
    value: Option<f64>,
    unit: &'static str,
    /// Not more than this is wanted; null where the number is only told.
    goal: Option<f64>,
}

pub(crate) fn run(how: How) -> anyhow::Result<()> {
    let about = Pair::choose()?.describe();
    let clock = Clock::new();
    let bar = how.bar(2 * how.windows + FLOODS + 2);
    let mut rows = Vec::new();
    let mut add = |name, value: f64, digits, unit, goal| {
        rows.push(Row { name, value: rounded(value, digits), unit, goal });
    };

    bar.set_message("starting");
    let (mut ready, mut bare) = (Windows::default(), Windows::default());
    for _ in 0..how.windows {
        bare.push(start_nothing()?);
        ready.push(start_engine()?);
        bar.inc(1);
    }
    add("start to first answer", ready.median(), 0, "ns", Some(1e8));
    add("  limit: a process that does nothing", bare.median(), 0, "ns", None);

    bar.set_message("idling");
    let config = EngineConfig { arena: Some(ByteSize(ARENA)), ..EngineConfig::default() };
    let beat = config.beat_interval();
    let engine = Engine::spawn(config, &Placement::default())?;
    let clients = [engine.client(Role::Scheduler, None)?, engine.client(Role::Worker, None)?];
    // Until then the engine is not idle.
    engine.wait_allocated()?;
    let mut probe = clients[0].probe();
    let (mut idle, mut naps, mut check) = (Windows::default(), Windows::default(), Windows::default());
    let mut napper = Child::spawn(&Naps(u64::try_from(beat.as_nanos())?))?;
    let naps_of_a_window = u32::try_from((IDLE.as_nanos() / beat.as_nanos()).max(1))?;
    for _ in 0..how.windows {
        naps.push(cpu_share(napper.pid(), || napper.ask(&naps_of_a_window))?);
        idle.push(cpu_share(engine.pid(), || {
            std::thread::sleep(IDLE);
            Ok(())
        })?);
        let before = clock.ticks();
        let mut healthy = 0;
        for _ in 0..CHECKS {
            healthy += u32::from(core::hint::black_box(&mut probe).is_healthy());
        }
        check.push(clock.ns(clock.ticks() - before) / f64::from(CHECKS));
        anyhow::ensure!(healthy == CHECKS, "the engine was unhealthy in {} checks", CHECKS - healthy);
        bar.inc(1);
    }
    drop(probe);
    drop(clients);
    napper.finish()?;
    add("idle, share of a core", idle.median() * 100.0, 3, "%", Some(0.3));
    add("  limit: a process that wakes up as often", naps.median() * 100.0, 3, "%", None);
    bar.set_message("flooding");
    let [mut turn, mut by_the_clock, mut plain, mut standstill] = [(); 4].map(|()| Windows::default());
    for _ in 0..FLOODS {
        let worst = turn::worst(&clock)?;
        turn.push(worst.turn);
        by_the_clock.push(worst.by_the_clock);
        plain.push(worst.plain);
        standstill.push(worst.standstill);
        bar.inc(1);
    }
    add("longest turn, under the worst clients, in CPU time", turn.median(), 0, "ns", Some(1e6));
    add("  by the clock", by_the_clock.median(), 0, "ns", None);
    add("  limit: a plain pass over as many cache lines", plain.median(), 0, "ns", None);
    add("  the beat's longest standstill meanwhile", standstill.median(), 0, "ns", None);
    add("is_healthy", check.median(), 2, "ns", Some(2.0));
    add("anonymous memory, empty", rss_anon(engine.pid())? as f64, 0, "bytes", None);
    engine.stop()?;

    bar.set_message("memory");
    let (few, _) = filled(FEW)?;
    bar.inc(1);
    let (many, small) = filled(MANY)?;
    bar.inc(1);
    // The tables of chunks and buckets ask for huge pages. Whether their first pages are such a page of 2 MiB depends on the addresses
    // that the kernel has chosen at this start: the same engine takes 2.2 MiB, or 1.7 more.
    add("anonymous memory, 10⁴ chunks", few, 0, "bytes", Some(f64::from(30 << 20)));
    add("anonymous memory, 10⁶ chunks", many, 0, "bytes", None);
    add("anonymous memory per chunk", (many - few) / f64::from(MANY - FEW), 1, "bytes", None);
    add("engine segment per chunk, in memory", small / f64::from(MANY), 1, "bytes", None);
    bar.finish_and_clear();
    print(how, &rows, about)
}

/// From the call that starts its process to the answer to a client's first request.
fn start_engine() -> anyhow::Result<f64> {
    let config = EngineConfig { arena: Some(ByteSize(ARENA)), ..EngineConfig::default() };
    let before = monotonic_ns();
    let engine = Engine::spawn(config, &Placement::default())?;
    let client = engine.client(Role::Scheduler, None)?;
    client.noop().context("the first request")?;
    let spent = monotonic_ns() - before;
    client.shutdown();
    engine.stop()?;
    Ok(spent as f64)
}

/// How long a process that does nothing takes, from the call that starts it to its end.
pub(crate) fn start_nothing() -> anyhow::Result<f64> {
    let before = monotonic_ns();
    let status = child::command(&Nothing)?.status().context("starting a process that does nothing")?;
    anyhow::ensure!(status.success(), "a process that does nothing failed: {status}");
    Ok((monotonic_ns() - before) as f64)
}

/// Share of a core that a process uses during `window`.
fn cpu_share(pid: u32, window: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let (time, cpu) = (monotonic_ns(), process_cpu_ns(pid)?);
    window()?;
    let (time, cpu) = (monotonic_ns() - time, process_cpu_ns(pid)? - cpu);
    Ok(cpu as f64 / time as f64)
}

/// Anonymous memory, and shared memory in use beside the arena, of an engine whose index holds `chunks` chunks.
fn filled(chunks: u32) -> anyhow::Result<(f64, f64)> {
    let engine = filled_engine(&Chains::new(chunks), EngineConfig::default(), &Placement::default())?;
    let anonymous = rss_anon(engine.pid())?;
    let segment = status_bytes(engine.pid(), "RssShmem:")?;
    engine.stop()?;
    Ok((anonymous as f64, segment as f64))
}

fn rss_anon(pid: u32) -> anyhow::Result<u64> {
    status_bytes(pid, "RssAnon:")
}

fn status_bytes(pid: u32, field: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    parse_status(&text, field).with_context(|| format!("{path} has no {field}"))
}

/// A field of `/proc/<pid>/status` that is given in kB, in bytes.
fn parse_status(text: &str, field: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kilobytes: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

fn print(how: How, rows: &[Row], about: String) -> anyhow::Result<()> {
    let mut sheet = Sheet::new(&["engine", "value", "goal"]);
    for row in rows {
        let show = |value: f64| match row.unit {
            "ns" => crate::report::time(value),
            "bytes" if value >= 1e6 => format!("{:.1} MiB", value / f64::from(1 << 20)),
            unit => format!("{} {unit}", number(value, if value < 10.0 { 3 } else { 0 })),
        };
        sheet.row(vec![
            row.name.to_owned(),
            row.value.map_or_else(|| "-".to_owned(), show),
            row.goal.map(|goal| format!("≤ {}", show(goal))).unwrap_or_default(),
        ]);
    }
    let notes = [
        about,
        format!(
            "arena {}; medians over {} windows; idle with two clients attached; the start is from its process's \
             to the answer to a client's first request; the longest turn is that of half a second with 64 ranks, \
             requests of 8192 keys and full rings, the median of {FLOODS} engines",
            crate::report::bytes(ARENA as usize),
            how.windows
        ),
    ];
    how.print(&rows, &sheet, &notes)
}

#[cfg(test)]
mod tests {
    use super::parse_status;

    #[test]
    fn the_kernels_numbers() {
        let text = "Name:\tkvring\nRssAnon:\t    1234 kB\nRssFile:\t 5 kB\n";
        assert_eq!(parse_status(text, "RssAnon:"), Some(1234 * 1024));
        assert_eq!(parse_status(text, "RssShmem:"), None);
    }
}

/// A process that ends at once: it shows the cost of starting one.
#[derive(Serialize, Deserialize)]
pub(crate) struct Nothing;

impl Job for Nothing {
    const NAME: &'static str = "nothing";

    fn be(self, _: Pipe) -> anyhow::Result<()> {
        Ok(())
    }
}

/// A process that does nothing but wake up this often, in nanoseconds: it shows the cost of being there.
#[derive(Serialize, Deserialize)]
pub(crate) struct Naps(u64);

impl Job for Naps {
    const NAME: &'static str = "naps";

    /// Takes so many naps for each message.
    fn be(self, mut pipe: Pipe) -> anyhow::Result<()> {
        let never = AtomicU32::new(0);
        while let Some(naps) = pipe.receive::<u32>(None)? {
            for _ in 0..naps {
                futex::wait_any(&[(&never, 0)], Deadline::after(Duration::from_nanos(self.0)));
            }
            child::answer(&mut pipe, &())?;
        }
        Ok(())
    }
}

//! `kvring bench rtt`: request and completion through the real engine loop, beside the raw round trips of the same
//! two processes' cores.

use crate::child::{Engine, Placement};
use crate::clock::Clock;
use crate::cores::{self, Pair};
use crate::pingpong::{Peer, Waiting};
use crate::report::{How, Sheet, number, rounded, time};
use crate::stats::{Samples, Windows};
use anyhow::Context;
use indicatif::ProgressBar;
use kvring_adapter::{Client, Role};
use kvring_engine::config::EngineConfig;
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;

/// Round trips of a window that spins.
const SPIN_ROUNDS: u32 = 20_000;
/// Round trips of a window that sleeps.
const SLEEP_ROUNDS: u32 = 500;
/// Before a round trip of two that sleep: longer than either stays awake.
const PAUSE_NS: f64 = 50_000.0;
/// Round trips before the first window, so that page faults and cold caches are not measured.
const WARM_UP: u32 = 500;

/// The output of `--json`. Null where the machine has one CPU.
#[derive(Serialize)]
struct Rtt {
    rtt_spin_p50_ns: Option<f64>,
    rtt_spin_p99_ns: Option<f64>,
    limit_spin_p50_ns: Option<f64>,
    limit_spin_p99_ns: Option<f64>,
    ratio_spin: Option<f64>,
    /// The same limit with the processor's `pause` hint in its loops.
    limit_pause_p50_ns: Option<f64>,
    ratio_pause: Option<f64>,
    rtt_wake_p50_ns: Option<f64>,
    limit_wake_p50_ns: Option<f64>,
    ratio_wake: Option<f64>,
    rtt_onecore_p50_ns: Option<f64>,
    limit_onecore_p50_ns: Option<f64>,
    ratio_onecore: Option<f64>,
}

/// Window by window.
#[derive(Default)]
struct Series {
    p50: Windows,
    p99: Windows,
}

impl Series {
    fn add(&mut self, clock: &Clock, mut samples: Samples) {
        let mut at = |share| samples.percentile(share).map_or(f64::NAN, |ticks| clock.between_ns(ticks));
        self.p50.push(at(0.5));
        self.p99.push(at(0.99));
    }
}

/// One way to wait: ours, its limit, and the limit with another loop.
#[derive(Default)]
struct Mode {
    ours: Series,
    limit: Series,
    other: Series,
}

/// The differences between the ways to wait.
struct Setup {
    name: &'static str,
    ours: usize,
    theirs: usize,
    /// How long the client and the engine are told to spin.
    client_spin: Option<Duration>,
    engine_spin_us: Option<u32>,
    /// The engine's process sees one CPU only, from its start.
    engine_confined: bool,
    limit: Waiting,
    other: Option<Waiting>,
    rounds: u32,
    pause_ns: f64,
}

pub(crate) fn run(how: How) -> anyhow::Result<()> {
    let pair = Pair::choose()?;
    let about = pair.describe();
    let clock = Clock::new();
    let bar = how.bar(how.windows * if pair.two() { 3 } else { 1 });
    let (mut spin, mut wake) = (None, None);
    if pair.two() {
        let setup = Setup {
            name: "spinning",
            ours: pair.ours,
            theirs: pair.theirs,
            client_spin: Some(Duration::from_secs(10)),
            engine_spin_us: None,
            engine_confined: false,
            limit: Waiting::Spin,
            other: Some(Waiting::Pause),
            rounds: SPIN_ROUNDS,
            pause_ns: 0.0,
        };
        spin = Some(measure(&setup, how, &clock, &bar)?);
        let setup = Setup {
            name: "asleep",
            client_spin: Some(Duration::ZERO),
            engine_spin_us: Some(0),
            limit: Waiting::Futex,
            other: None,
            rounds: SLEEP_ROUNDS,
            pause_ns: PAUSE_NS,
            ..setup
        };
        wake = Some(measure(&setup, how, &clock, &bar)?);
    }
    // Nothing is said about spinning here: both find out for themselves that they have one CPU.
    let setup = Setup {
        name: "one core",
        ours: pair.ours,
        theirs: pair.ours,
        client_spin: None,
        engine_spin_us: None,
        engine_confined: true,
        limit: Waiting::Futex,
        other: None,
        rounds: SLEEP_ROUNDS,
        pause_ns: 0.0,
    };
    let onecore = measure(&setup, how, &clock, &bar)?;
    bar.finish_and_clear();
    print(how, &clock, about, spin.as_ref(), wake.as_ref(), &onecore)
}

fn measure(setup: &Setup, how: How, clock: &Clock, bar: &ProgressBar) -> anyhow::Result<Mode> {
    bar.set_message(setup.name);
    let default = EngineConfig::default();
    let config = EngineConfig {
        arena: Some(kvring_engine::byte_size::ByteSize(64 << 20)),
        spin_us: setup.engine_spin_us.unwrap_or(default.spin_us),
        ..default
    };
    let placement = if setup.engine_confined {
        Placement { cpus: vec![setup.theirs], ..Placement::default() }
    } else {
        Placement { service_cpu: Some(setup.theirs), ..Placement::default() }
    };
    let engine = Engine::spawn(config, &placement)?;
    let mode = cores::on(&[setup.ours], || {
        let mut peer = Peer::spawn(setup.theirs)?;
        let client = engine.client(Role::Scheduler, setup.client_spin)?;
        round_trips(&client, WARM_UP, setup.pause_ns, clock)?;
        peer.window(setup.limit, WARM_UP, setup.pause_ns, clock)?;
        let mut mode = Mode::default();
        for _ in 0..how.windows {
            mode.limit.add(clock, peer.window(setup.limit, setup.rounds, setup.pause_ns, clock)?);
            mode.ours.add(clock, round_trips(&client, setup.rounds, setup.pause_ns, clock)?);
            if let Some(other) = setup.other {
                mode.other.add(clock, peer.window(other, setup.rounds, setup.pause_ns, clock)?);
            }
            bar.inc(1);
        }
        client.shutdown();
        Ok(mode)
    })?;
    engine.stop()?;
    Ok(mode)
}

/// One window through the engine, with a pause before each round trip.
pub(crate) fn round_trips(
    client: &Arc<Client>,
    rounds: u32,
    pause_ns: f64,
    clock: &Clock,
) -> anyhow::Result<Samples> {
    let mut samples = Samples::with_capacity(rounds as usize);
    let mut probe = client.probe();
    for _ in 0..rounds {
        if pause_ns > 0.0 {
            clock.pause(pause_ns);
        }
        let before = clock.ticks();
        probe.noop().context("a round trip through the engine")?;
        samples.push(clock.ticks() - before);
    }
    Ok(samples)
}

fn print(
    how: How,
    clock: &Clock,
    about: String,
    spin: Option<&Mode>,
    wake: Option<&Mode>,
    onecore: &Mode,
) -> anyhow::Result<()> {
    let p50 = |series: &Series| rounded(series.p50.median(), 1);
    let p99 = |series: &Series| rounded(series.p99.median(), 1);
    let ratio = |ours: &Series, limit: &Series| rounded(ours.p50.ratio(&limit.p50), 3);
    let json = Rtt {
        rtt_spin_p50_ns: spin.and_then(|mode| p50(&mode.ours)),
        rtt_spin_p99_ns: spin.and_then(|mode| p99(&mode.ours)),
        limit_spin_p50_ns: spin.and_then(|mode| p50(&mode.limit)),
        limit_spin_p99_ns: spin.and_then(|mode| p99(&mode.limit)),
        ratio_spin: spin.and_then(|mode| ratio(&mode.ours, &mode.limit)),
        limit_pause_p50_ns: spin.and_then(|mode| p50(&mode.other)),
        ratio_pause: spin.and_then(|mode| ratio(&mode.ours, &mode.other)),
        rtt_wake_p50_ns: wake.and_then(|mode| p50(&mode.ours)),
        limit_wake_p50_ns: wake.and_then(|mode| p50(&mode.limit)),
        ratio_wake: wake.and_then(|mode| ratio(&mode.ours, &mode.limit)),
        rtt_onecore_p50_ns: p50(&onecore.ours),
        limit_onecore_p50_ns: p50(&onecore.limit),
        ratio_onecore: ratio(&onecore.ours, &onecore.limit),
    };
    let mut sheet =
        Sheet::new(&["round trip", "engine p50", "p99", "limit p50", "p99", "ratio of p50", "goal"]);
    let mut row = |name: &str, ours: &Series, limit: &Series, goal: &str| {
        sheet.row(vec![
            name.to_owned(),
            time(ours.p50.median()),
            time(ours.p99.median()),
            time(limit.p50.median()),
            time(limit.p99.median()),
            number(ours.p50.ratio(&limit.p50), 2),
            goal.to_owned(),
        ]);
    };
    if let Some(mode) = spin {
        row("both spin, two cores", &mode.ours, &mode.limit, "≤ 1.5");
        row("  against a limit that pauses", &mode.ours, &mode.other, "");
    }
    if let Some(mode) = wake {
        row("both asleep, two cores", &mode.ours, &mode.limit, "≤ 1.25");
    }
    row("one core", &onecore.ours, &onecore.limit, "≤ 1.5");
    let notes = [
        about,
        format!(
            "limits: cache-line ping-pong over two lines (spin), shared-futex ping-pong (asleep, one core), between \
             two processes on the same cores; {} windows each, in turn; the clock's own {} per reading taken off",
            how.windows,
            time(clock.overhead_ns())
        ),
        if spin.is_none() {
            "one CPU: nothing can be measured on two cores".to_owned()
        } else {
            String::new()
        },
    ];
    let notes: Vec<String> = notes.into_iter().filter(|note| !note.is_empty()).collect();
    how.print(&json, &sheet, &notes)
}

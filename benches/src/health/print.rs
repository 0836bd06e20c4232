//! What `kvring bench health` prints.

use super::holder::{LEASES, WRITING};
use super::notice::{Notices, Small};
use super::restart::Restarts;
use super::{FEW, MANY, Measured, SMALL_ARENA, Times};
use crate::lookup::fill::CHAIN;
use crate::report::{How, Sheet, number, rounded, time};
use kvring_engine::byte_size::ByteSize;
use serde::Serialize;

const US: f64 = 1e3;
const MS: f64 = 1e6;

/// What is wanted at the median.
const GOAL_NOTICE_US: f64 = 150.0;
const GOAL_RESTART_MS: f64 = 50.0;
const GOAL_RESTART_1M_MS: f64 = 300.0;
const GOAL_RECLAIM_MS: f64 = 10.0;

/// What `--json` prints. Null where nothing was measured; a `_n` says of how many times the percentiles are.
#[derive(Serialize)]
struct Health {
    /// Before the run.
    load_average: Option<f64>,
    /// Allocated by each engine that was killed for `notice_death`, and not mapped by it.
    arena_bytes: u64,
    notice_death_p50_us: Option<f64>,
    notice_death_p99_us: Option<f64>,
    notice_death_n: usize,
    /// A bare process that holds the same arena open, unmapped.
    limit_robust_p50_us: Option<f64>,
    limit_robust_p99_us: Option<f64>,
    ratio_notice_death: Option<f64>,
    /// The same with an arena of `small_arena_bytes`.
    small_arena_bytes: u64,
    notice_death_small_p50_us: Option<f64>,
    notice_death_small_p99_us: Option<f64>,
    notice_death_small_n: usize,
    limit_robust_small_p50_us: Option<f64>,
    limit_robust_small_p99_us: Option<f64>,
    ratio_notice_death_small: Option<f64>,
    /// The same with all threads on whichever CPU the kernel likes: also on the one on which the engine dies.
    notice_death_anywhere_p50_us: Option<f64>,
    notice_death_anywhere_p99_us: Option<f64>,
    notice_death_anywhere_n: usize,
    limit_robust_anywhere_p50_us: Option<f64>,
    limit_robust_anywhere_p99_us: Option<f64>,
    restart_to_first_hit_p50_ms: Option<f64>,
    restart_to_first_hit_p99_ms: Option<f64>,
    restart_to_first_hit_n: usize,
    /// An empty process and a plain read of the slot headers, one after the other; each alone below.
    limit_restart_p50_ms: Option<f64>,
    limit_restart_process_p50_ms: Option<f64>,
    limit_restart_read_p50_ms: Option<f64>,
    ratio_restart: Option<f64>,
    restart_to_first_hit_1m_p50_ms: Option<f64>,
    restart_to_first_hit_1m_p99_ms: Option<f64>,
    restart_to_first_hit_1m_n: usize,
    limit_restart_1m_p50_ms: Option<f64>,
    limit_restart_1m_process_p50_ms: Option<f64>,
    limit_restart_1m_read_p50_ms: Option<f64>,
    ratio_restart_1m: Option<f64>,
    /// Chunks found after a restart, of those before: the least of all restarts.
    warm_fraction: Option<f64>,
    client_death_to_reclaim_p50_ms: Option<f64>,
    client_death_to_reclaim_p99_ms: Option<f64>,
    client_death_to_reclaim_n: usize,
    limit_reclaim_p50_ms: Option<f64>,
    ratio_reclaim: Option<f64>,
    /// What each killed client held.
    reclaim_leases: u64,
    reclaim_pins: u64,
    reclaim_writing_slots: u64,
}

/// One kind of death, ready to be told.
struct Told {
    what: String,
    /// In nanoseconds, as the limit and the goal.
    p50: f64,
    /// The 99th percentile, or the longest where there are few.
    high: f64,
    goal: Option<f64>,
    limit: f64,
    limit_high: f64,
    count: usize,
}

impl Told {
    fn new(what: String, goal: Option<f64>, ours: Option<&mut Times>, limit: (f64, f64)) -> Told {
        let mut none = Times::default();
        let ours = ours.unwrap_or(&mut none);
        Told {
            what,
            p50: ours.at(0.5, 1.0),
            high: ours.at(0.99, 1.0),
            goal,
            limit: limit.0,
            limit_high: limit.1,
            count: ours.count,
        }
    }

    fn notices(what: String, goal: Option<f64>, notices: Option<&mut Notices>) -> Told {
        match notices {
            None => Told::new(what, goal, None, (f64::NAN, f64::NAN)),
            Some(notices) => {
                let limit = (notices.limit.at(0.5, 1.0), notices.limit.at(0.99, 1.0));
                Told::new(what, goal, Some(&mut notices.ours), limit)
            }
        }
    }

    fn restarts(what: String, goal: f64, restarts: Option<&mut Restarts>) -> Told {
        match restarts {
            None => Told::new(what, Some(goal), None, (f64::NAN, f64::NAN)),
            Some(restarts) => {
                let limit = restarts.process.at(0.5, 1.0) + restarts.read.at(0.5, 1.0);
                Told::new(what, Some(goal), Some(&mut restarts.to_hit), (limit, f64::NAN))
            }
        }
    }

    fn ratio(&self) -> Option<f64> {
        rounded(self.p50 / self.limit, 2)
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.what.clone(),
            time(self.p50),
            time(self.high),
            self.goal.map(|goal| format!("≤ {}", time(goal))).unwrap_or_default(),
            time(self.limit),
            number(self.p50 / self.limit, 2),
            self.count.to_string(),
        ]
    }
}

pub(super) fn print(how: How, mut measured: Measured, about: String) -> anyhow::Result<()> {
    let (arena, small_arena) = (ByteSize(measured.arena_bytes).human(), ByteSize(SMALL_ARENA).human());
    let goal = Some(GOAL_NOTICE_US * US);
    let large = Told::notices(
        format!("engine killed, sleeping caller told ({arena} allocated)"),
        goal,
        measured.large.as_mut(),
    );
    let mut none = Small::default();
    let kinds = measured.small.as_mut().unwrap_or(&mut none);
    let small = Told::notices(format!("  the same, {small_arena}"), goal, Some(&mut kinds.caller));
    let anywhere = Told::notices("  the same, on any CPU".to_owned(), None, Some(&mut kinds.anywhere));
    let few = Told::restarts(
        "restart to first hit, 10⁵ chunks".to_owned(),
        GOAL_RESTART_MS * MS,
        measured.few.as_mut(),
    );
    let many = Told::restarts(
        "restart to first hit, 10⁶ chunks".to_owned(),
        GOAL_RESTART_1M_MS * MS,
        measured.many.as_mut(),
    );
    let reclaim_goal = Some(GOAL_RECLAIM_MS * MS);
    let what = "client killed, nothing of it left".to_owned();
    let reclaim = match measured.reclaim.as_mut() {
        None => Told::new(what, reclaim_goal, None, (f64::NAN, f64::NAN)),
        Some(reclaims) => {
            let limit = (reclaims.limit.at(0.5, 1.0), reclaims.limit.at(0.99, 1.0));
            Told::new(what, reclaim_goal, Some(&mut reclaims.ours), limit)
        }
    };
    let mut sheet = Sheet::new(&["death", "p50", "p99", "goal of p50", "limit p50", "ratio of p50", "n"]);
    let told = [&large, &small, &anywhere, &reclaim, &few, &many];
    told.iter()
        .filter(|told| told.count > 0 || told.limit.is_finite())
        .for_each(|told| sheet.row(told.row()));
    let warm = warm_fraction(&measured);
    if let Some(warm) = warm {
        let mut row = vec![String::new(); 7];
        row[0] = "chunks found after a restart".to_owned();
        row[1] = format!("{} %", number(warm * 100.0, 2));
        row[3] = "100 %".to_owned();
        sheet.row(row);
    }
    let part = |restarts: Option<&mut Restarts>| {
        restarts.map_or((None, None), |restarts| {
            (rounded(restarts.process.at(0.5, MS), 3), rounded(restarts.read.at(0.5, MS), 3))
        })
    };
    let (few_process, few_read) = part(measured.few.as_mut());
    let (many_process, many_read) = part(measured.many.as_mut());
    let us = |ns: f64| rounded(ns / US, 1);
    let ms = |ns: f64| rounded(ns / MS, 3);
    let json = Health {
        load_average: measured.load_average,
        arena_bytes: measured.arena_bytes,
        notice_death_p50_us: us(large.p50),
        notice_death_p99_us: us(large.high),
        notice_death_n: large.count,
        limit_robust_p50_us: us(large.limit),
        limit_robust_p99_us: us(large.limit_high),
        ratio_notice_death: large.ratio(),
        small_arena_bytes: SMALL_ARENA,
        notice_death_small_p50_us: us(small.p50),
        notice_death_small_p99_us: us(small.high),
        notice_death_small_n: small.count,
        limit_robust_small_p50_us: us(small.limit),
        limit_robust_small_p99_us: us(small.limit_high),
        ratio_notice_death_small: small.ratio(),
        notice_death_anywhere_p50_us: us(anywhere.p50),
        notice_death_anywhere_p99_us: us(anywhere.high),
        notice_death_anywhere_n: anywhere.count,
        limit_robust_anywhere_p50_us: us(anywhere.limit),
        limit_robust_anywhere_p99_us: us(anywhere.limit_high),
        restart_to_first_hit_p50_ms: ms(few.p50),
        restart_to_first_hit_p99_ms: ms(few.high),
        restart_to_first_hit_n: few.count,
        limit_restart_p50_ms: ms(few.limit),
        limit_restart_process_p50_ms: few_process,
        limit_restart_read_p50_ms: few_read,
        ratio_restart: few.ratio(),
        restart_to_first_hit_1m_p50_ms: ms(many.p50),
        restart_to_first_hit_1m_p99_ms: ms(many.high),
        restart_to_first_hit_1m_n: many.count,
        limit_restart_1m_p50_ms: ms(many.limit),
        limit_restart_1m_process_p50_ms: many_process,
        limit_restart_1m_read_p50_ms: many_read,
        ratio_restart_1m: many.ratio(),
        warm_fraction: warm,
        client_death_to_reclaim_p50_ms: ms(reclaim.p50),
        client_death_to_reclaim_p99_ms: ms(reclaim.high),
        client_death_to_reclaim_n: reclaim.count,
        limit_reclaim_p50_ms: ms(reclaim.limit),
        ratio_reclaim: reclaim.ratio(),
        reclaim_leases: LEASES,
        reclaim_pins: LEASES * CHAIN as u64,
        reclaim_writing_slots: WRITING,
    };
    how.print(&json, &sheet, &notes(&measured, about))
}

/// The least, of all restarts.
fn warm_fraction(measured: &Measured) -> Option<f64> {
    let both = [&measured.few, &measured.many];
    let least = both.into_iter().flatten().map(|restarts| restarts.warm).reduce(f64::min)?;
    rounded(least, 6)
}

fn notes(measured: &Measured, about: String) -> Vec<String> {
    let mut notes = vec![
        about,
        "p99 is the longest where n < 100. Limits, one after each kill: a bare process with one robust futex and one bare \
         sleeper on it (it holds the dead engine's arena open but, as an engine does, not mapped); for a restart, an \
         empty process and a plain read of as many slot headers."
            .to_owned(),
        "Sleeping caller: the engine is stopped (SIGSTOP), a call sleeps for its answer, the engine is killed. Engines and \
         bare processes die on one CPU, sleepers wake up on the other; on any CPU: they may wake up where the engine \
         dies, and wait until that is over."
            .to_owned(),
        format!(
            "Killed client: {LEASES} leases of {CHAIN} chunks and {WRITING} slots being written, until its entries are \
             free again. Restart: from the making of the successor's process, a client with default options."
        ),
    ];
    for (chunks, restarts) in [(FEW, &measured.few), (MANY, &measured.many)] {
        if measured.restarts_wanted && restarts.is_none() {
            notes.push(format!("{chunks} chunks: no room for them in /dev/shm or memory"));
        }
        if restarts.as_ref().is_some_and(|restarts| restarts.without > 0) {
            notes.push(format!(
                "no first hit with {chunks} chunks: the successor did not know what was stored"
            ));
        }
    }
    notes
}

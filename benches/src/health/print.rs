//! The output of `kvring bench health`.

use super::holder::{LEASES, WRITING};
use super::notice::{Notices, Small};
use super::restart::Restarts;
use super::{FEW, MANY, Measured, SMALL_ARENA, Times};
use crate::lookup::fill::CHAIN;
use crate::report::{How, Sheet, number, rounded, time};
use kvring_engine::byte_size::ByteSize;

const US: f64 = 1e3;
const MS: f64 = 1e6;

/// The goals for the medians.
const GOAL_NOTICE_US: f64 = 150.0;
const GOAL_RESTART_MS: f64 = 50.0;
const GOAL_RESTART_1M_MS: f64 = 60.0;
const GOAL_RECLAIM_MS: f64 = 10.0;

/// The output of `--json`: each name ends with its unit. Null stands for what was not measured; `_n` is the number of times that the
/// percentiles are taken from.
type Json = serde_json::Map<String, serde_json::Value>;

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
                Told::new(what, Some(goal), Some(&mut restarts.to_store), (limit, f64::NAN))
            }
        }
    }

    fn ratio(&self) -> Option<f64> {
        rounded(self.p50 / self.limit, 2)
    }

    /// Adds its numbers under these names, with times in `us` or `ms`. A limit in `us` has a 99th percentile as well.
    fn put(&self, json: &mut Json, ours: &str, limit: &str, ratio: Option<&str>, unit: &str) {
        let show = |ns: f64| if unit == "us" { rounded(ns / US, 1) } else { rounded(ns / MS, 3) };
        json.insert(format!("{ours}_p50_{unit}"), show(self.p50).into());
        json.insert(format!("{ours}_p99_{unit}"), show(self.high).into());
        json.insert(format!("{ours}_n"), self.count.into());
        json.insert(format!("{limit}_p50_{unit}"), show(self.limit).into());
        if unit == "us" {
            json.insert(format!("{limit}_p99_us"), show(self.limit_high).into());
        }
        if let Some(ratio) = ratio {
            json.insert(ratio.to_owned(), self.ratio().into());
        }
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
        "restart to first store, 10⁵ chunks".to_owned(),
        GOAL_RESTART_MS * MS,
        measured.few.as_mut(),
    );
    let many = Told::restarts(
        "restart to first store, 10⁶ chunks".to_owned(),
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
    let found = hit_fraction(&measured);
    if let Some(found) = found {
        let mut row = vec![String::new(); 7];
        row[0] = "lookups that found all, no engine serving".to_owned();
        row[1] = format!("{} %", number(found * 100.0, 2));
        row[3] = "100 %".to_owned();
        sheet.row(row);
    }
    let lookups = lookups(&mut measured);
    for (state, p50, p99, count) in &lookups {
        let mut row = vec![String::new(); 7];
        row[0] = format!("  lookup of {CHAIN} chunks, engine {state}");
        (row[1], row[2], row[6]) = (time(*p50), time(*p99), count.to_string());
        sheet.row(row);
    }
    let mut json = Json::new();
    large.put(&mut json, "notice_death", "limit_robust", Some("ratio_notice_death"), "us");
    let ratio = Some("ratio_notice_death_small");
    small.put(&mut json, "notice_death_small", "limit_robust_small", ratio, "us");
    anywhere.put(&mut json, "notice_death_anywhere", "limit_robust_anywhere", None, "us");
    few.put(&mut json, "restart_to_first_store", "limit_restart", Some("ratio_restart"), "ms");
    many.put(&mut json, "restart_to_first_store_1m", "limit_restart_1m", Some("ratio_restart_1m"), "ms");
    reclaim.put(&mut json, "client_death_to_reclaim", "limit_reclaim", Some("ratio_reclaim"), "ms");
    for (limit, restarts) in [("limit_restart", &mut measured.few), ("limit_restart_1m", &mut measured.many)]
    {
        // The limit is an empty process and a plain read of the tables, one after the other; here is each alone.
        let (process, read) = restarts.as_mut().map_or((None, None), |restarts| {
            (rounded(restarts.process.at(0.5, MS), 3), rounded(restarts.read.at(0.5, MS), 3))
        });
        json.insert(format!("{limit}_process_p50_ms"), process.into());
        json.insert(format!("{limit}_read_p50_ms"), read.into());
    }
    for (name, value) in [
        // Before the run.
        ("load_average", measured.load_average.into()),
        // The arena that each engine has allocated, and not mapped, when it is killed under a caller; and the small one.
        ("arena_bytes", measured.arena_bytes.into()),
        ("small_arena_bytes", SMALL_ARENA.into()),
        // Chunks found after a restart, of those before: the least of all restarts.
        ("warm_fraction", warm.into()),
        // Lookups that found a whole chain, of all while the engine was stopped, dead or recovering.
        ("hit_fraction_while_dead", found.into()),
        // The leases, pins and slots that each killed client held.
        ("reclaim_leases", LEASES.into()),
        ("reclaim_pins", (LEASES * CHAIN as u64).into()),
        ("reclaim_writing_slots", WRITING.into()),
    ] {
        json.insert(name.to_owned(), value);
    }
    for (state, p50, p99, count) in &lookups {
        json.insert(format!("lookup_{state}_p50_us"), rounded(p50 / US, 2).into());
        json.insert(format!("lookup_{state}_p99_us"), rounded(p99 / US, 2).into());
        json.insert(format!("lookup_{state}_n"), (*count).into());
    }
    how.print(&json, &sheet, &notes(&measured, about))
}

/// What lookups cost while the engine is not serving: its state, the median, the 99th percentile, and how many there were; of the
/// larger number of chunks that was measured.
fn lookups(measured: &mut Measured) -> Vec<(&'static str, f64, f64, usize)> {
    let Some(restarts) = measured.many.as_mut().or(measured.few.as_mut()) else { return Vec::new() };
    let Restarts { stopped, dead, recovering, .. } = restarts;
    [("stopped", stopped), ("dead", dead), ("recovering", recovering)]
        .into_iter()
        .map(|(state, times)| (state, times.at(0.5, 1.0), times.at(0.99, 1.0), times.count))
        .collect()
}

/// How many of the lookups without an engine that serves found a whole chain.
fn hit_fraction(measured: &Measured) -> Option<f64> {
    let both = [&measured.few, &measured.many];
    let sums = both
        .into_iter()
        .flatten()
        .fold((0, 0), |(found, all), restarts| (found + restarts.found, all + restarts.looked_up));
    if sums.1 == 0 { None } else { rounded(sums.0 as f64 / sums.1 as f64, 6) }
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
         empty process and a plain read of as many chunk records and slot headers."
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
            notes.push(format!("no first store with {chunks} chunks: the successor did not serve in time"));
        }
    }
    notes
}

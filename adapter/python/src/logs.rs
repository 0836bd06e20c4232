//! Carries the adapters' log records to Python's `logging`.
//!
//! A subscriber puts records into a queue, and a Python thread takes them out. So a thread that logs never waits for
//! the interpreter.

use crate::errors::guarded;
use crate::options::milliseconds;
use crate::records::{Record, Records};
use core::fmt::Write;
use kvring_shm_abi::sync::{AtomicU64, Ordering};
use pyo3::prelude::*;
use std::sync::Once;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber, span};

/// The queue of one process.
struct Queue {
    pid: u32,
    records: Records,
}

/// The address of this process's queue, or of its parent's if this process was forked and has not logged yet; 0 if
/// there is none yet.
static QUEUE: AtomicU64 = AtomicU64::new(0);
/// The lowest `logging` level of records that are kept.
static LEVEL: AtomicU64 = AtomicU64::new(INFO);
const INFO: u64 = 20;

/// This process's queue. A forked child begins with an empty one, because its copy of the parent's may be locked for
/// ever.
fn queue() -> &'static Queue {
    let pid = std::process::id();
    let mut known = QUEUE.load(Ordering::Acquire);
    let mut fresh: Option<Box<Queue>> = None;
    loop {
        if known != 0 {
            // SAFETY: the address of a queue that is never freed, and whose content the Release below has published.
            let queue: &'static Queue = unsafe { &*core::ptr::with_exposed_provenance(known as usize) };
            if queue.pid == pid {
                return queue;
            }
        }
        let made = fresh.take().unwrap_or_else(|| Box::new(Queue { pid, records: Records::default() }));
        let made = Box::into_raw(made);
        match QUEUE.compare_exchange(
            known,
            made.expose_provenance() as u64,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            // SAFETY: the queue is never freed.
            Ok(_) => return unsafe { &*made },
            Err(now) => {
                known = now;
                // SAFETY: the pointer is from `into_raw` above, and no other thread has seen it.
                fresh = Some(unsafe { Box::from_raw(made) });
            }
        }
    }
}

/// Python's number for a level.
fn number(level: &Level) -> u64 {
    match *level {
        Level::ERROR => 40,
        Level::WARN => 30,
        Level::INFO => INFO,
        Level::DEBUG | Level::TRACE => 10,
    }
}

struct Forward;

impl Subscriber for Forward {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event()
            && metadata.target().starts_with("kvring")
            && *metadata.level() <= Level::DEBUG
            && number(metadata.level()) >= LEVEL.load(Ordering::Relaxed)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match LEVEL.load(Ordering::Relaxed) {
            ..=10 => LevelFilter::DEBUG,
            11..=20 => LevelFilter::INFO,
            21..=30 => LevelFilter::WARN,
            31..=40 => LevelFilter::ERROR,
            _ => LevelFilter::OFF,
        })
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        // kvring_adapter::client → kvring.adapter.client
        let logger = event.metadata().target().replace("::", ".").replacen('_', ".", 1);
        let level = number(event.metadata().level()) as i32;
        queue().records.push((level, logger, text.0));
    }

    // Spans are ignored.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// The text of a record: "message key=value …".
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn core::fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            // The message comes first in the text, wherever it comes among the fields.
            "message" => {
                let rest = core::mem::take(&mut self.0);
                write!(self.0, "{value:?}{rest}")
            }
            name => write!(self.0, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// Called before a process makes a client: from now on log records are kept, and a Python thread forwards them.
pub(crate) fn begin(py: Python<'_>) -> PyResult<()> {
    static INSTALL: Once = Once::new();
    // The first thread here waits for nothing, so the others wait only a moment.
    INSTALL.call_once(|| {
        // This fails only if an extension that shares our statics has set a subscriber before, and there is none.
        let _ = tracing::subscriber::set_global_default(Forward);
    });
    py.import("kvring._logs")?.call_method0("ensure")?;
    Ok(())
}

/// Takes the log records of this process's adapters, each as (`logging` level, target, text). Waits at most `timeout_ms`
/// milliseconds for the first one, without the GIL, and then returns an empty list; after `close_logs` it does not wait.
#[pyfunction]
pub(crate) fn next_logs(py: Python<'_>, timeout_ms: f64) -> PyResult<Vec<Record>> {
    guarded(py, || {
        let timeout = milliseconds(py, "timeout_ms", timeout_ms)?;
        Ok(py.detach(|| queue().records.take(timeout)))
    })
}

/// Ends `next_logs`, for good: called before the interpreter ends.
#[pyfunction]
pub(crate) fn close_logs(py: Python<'_>) -> PyResult<()> {
    guarded(py, || {
        py.detach(|| queue().records.close());
        Ok(())
    })
}

/// Sets the lowest `logging` level of records that the adapters log; it is `logging.INFO` to begin with. A record below it
/// costs nothing.
#[pyfunction]
pub(crate) fn set_log_level(py: Python<'_>, level: u32) -> PyResult<()> {
    guarded(py, || {
        LEVEL.store(level.into(), Ordering::Relaxed);
        py.detach(tracing::callsite::rebuild_interest_cache);
        Ok(())
    })
}

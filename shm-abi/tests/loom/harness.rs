//! Runs a model, and requires that a broken one is caught for the right reason.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, Once};
use std::time::Instant;

/// Loom's message when every thread is blocked. In these models it means that a wake-up was lost.
pub(crate) const LOST_WAKE_UP: &str = "deadlock; threads";

/// Explores `model`. A large model needs a limit of `preemptions` preemptions in one execution, or the exploration would not end.
pub(crate) fn holds(name: &str, preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let begin = Instant::now();
    let executions = Arc::new(Mutex::new(0u64));
    explore(preemptions, &executions, model);
    let count = *executions.lock().unwrap();
    println!("{name}: holds in {count} executions, {:.1} s", begin.elapsed().as_secs_f64());
}

/// The negative control: exploring `model` must end in a panic that says `reason`.
pub(crate) fn fails(
    name: &str,
    reason: &str,
    preemptions: Option<usize>,
    model: impl Fn() + Send + Sync + 'static,
) {
    let executions = Arc::new(Mutex::new(0u64));
    let outcome = quietly(|| catch_unwind(AssertUnwindSafe(|| explore(preemptions, &executions, model))));
    let count = *executions.lock().unwrap();
    let Err(panic) = outcome else {
        panic!("{name}: the broken protocol passed {count} executions: the model proves nothing");
    };
    let said = message(panic.as_ref());
    assert!(said.contains(reason), "{name}: expected a failure that says {reason:?}, got {said:?}");
    println!("{name}: caught in execution {count}");
}

fn explore(
    preemptions: Option<usize>,
    executions: &Arc<Mutex<u64>>,
    model: impl Fn() + Send + Sync + 'static,
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(preemptions);
    builder.max_branches = 10_000;
    let executions = executions.clone();
    builder.check(move || {
        *executions.lock().unwrap() += 1;
        model();
    });
}

fn message(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "something that is not text",
    }
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with this thread's panics unprinted: a model's threads are coroutines on the thread that explores it.
fn quietly<T>(f: impl FnOnce() -> T) -> T {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                previous(info);
            }
        }));
    });
    QUIET.set(true);
    let value = f();
    QUIET.set(false);
    value
}

//! `kvring clear`: an operator empties the cache.

use crate::console;
use crate::status::quoted_name;
use anyhow::{Context, bail};
use kvring_adapter::{Client, ClientOptions, DEFAULT_ENGINE, Role};
use kvring_shm_abi::segment::EngineName;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

/// Drop everything in an engine that is not in use.
///
/// Chunks that requests hold at the moment stay; so do registrations, counters and memory.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  kvring clear                            the engine named `default`
  kvring clear --name prod                another one")]
pub(crate) struct Args {
    /// The engine's name
    #[arg(long, default_value = DEFAULT_ENGINE)]
    name: EngineName,

    /// How long to wait for the engine, in seconds: 1 to 86400
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let client = attach(&args.name, "kvring clear", Duration::from_secs(args.timeout))?;
    let dropped = client.clear().with_context(|| format!("cannot clear {}", quoted_name(&args.name)))?;
    writeln!(console::out(), "dropped {dropped} chunks")?;
    Ok(())
}

/// A client in the scheduler's role, attached.
///
/// # Errors
/// There is no engine, it is dead, or it does not answer. The error says what to do about it.
fn attach(engine: &EngineName, client: &str, timeout: Duration) -> anyhow::Result<Arc<Client>> {
    let options = ClientOptions {
        engine: engine.to_string(),
        client: client.to_owned(),
        attach_timeout: timeout,
        operation_timeout: timeout,
        ..ClientOptions::default()
    };
    let client = Client::new(Role::Scheduler, options)?;
    // A fault that cannot mend itself within the timeout is reported at once.
    if let Some(error) = client.diagnose() {
        bail!(error);
    }
    if let Err(health) = client.wait_ready(timeout) {
        match client.diagnose() {
            Some(error) => bail!(error),
            None => bail!(
                "engine {} is {health}: no attachment within {} s; `kvring status` says more",
                quoted_name(engine),
                timeout.as_secs()
            ),
        }
    }
    Ok(client)
}

//! The other process of a test: an engine, a client that is driven over its pipes, or a bystander.

use kvring_engine::config::{EngineConfig, Overrides};
use kvring_engine::segments::SetupError;
use kvring_engine::{Engine, StartError, StopHandle};
use kvring_rig::child::die_with_parent;
use nix::sys::signal::Signal;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    // This process ends with the test that started it, also where that is killed.
    let _ = die_with_parent();
    kvring_tests::log();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["engine", overrides] => match engine(overrides) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        },
        ["client"] => {
            kvring_tests::peer::serve();
            ExitCode::SUCCESS
        }
        ["traffic", engine] => {
            kvring_tests::traffic::run(engine);
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: kvring-test-peer engine JSON | client | traffic ENGINE");
            ExitCode::FAILURE
        }
    }
}

fn engine(overrides: &str) -> Result<(), Box<dyn std::error::Error>> {
    let overrides: Overrides = serde_json::from_str(overrides)?;
    let config = EngineConfig::default().with(overrides)?;
    kvring_engine::process::disable_core_dumps();
    // Blocked in every thread, and waited for in one: a clean end, as `kvring serve` has it.
    let mut signals = nix::sys::signal::SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    // No thread but this one, the service thread, is to be ended by a test.
    kvring_tests::ends::block();
    let stop = StopHandle::default();
    let stopped = stop.clone();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            stopped.stop();
        }
    });
    let engine = match Engine::create(&config, &stop) {
        Err(StartError::Setup(SetupError::Stopped)) => return Ok(()),
        created => created?,
    };
    engine.doubt_after_a_panic();
    kvring_tests::ends::install();
    kvring_tests::ends::unblock();
    engine.run(|| {
        #[allow(clippy::disallowed_methods, reason = "the test that started it reads it")]
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "serving");
        let _ = out.flush();
    });
    Ok(())
}

//! The command `kvring`: the engine (`serve`), the commands that look at it and after it (`status`, `clear`, `remove`), and
//! those that show what it does (`replay`, `chaos`, `simulate`, `bench`), which are in the crate `kvring-benches`.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, and from `status` 3: the engine does not serve. A command does not fail because
//! nobody reads what it prints: see [`console::out`].

mod clear;
mod console;
mod flags;
mod remove;
mod serve;
mod status;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// A KV-cache engine for LLM serving on one node: vLLM's KV cache in shared memory, kept when GPU memory is not.
#[derive(Parser, Debug)]
#[command(
    name = "kvring",
    version,
    arg_required_else_help = true,
    after_help = "\
Examples:
  kvring serve --arena 32GiB     start the node's engine; Ctrl-C ends it
  kvring status                  how it is and what it holds, also while it hangs
  kvring replay                  see it work: real traffic, every byte verified
  kvring simulate trace.jsonl    how much memory is worth its price

`kvring COMMAND --help` explains a command. Exit codes: 0 done, 1 failed,
2 wrong usage (a flag, or a setting in a file, that cannot be), and from `status` 3:
the engine does not serve."
)]
struct Cli {
    /// What is logged to stderr: off, error, warn, info, debug or trace; also for a part of kvring, as kvring_engine=debug,
    /// several of these joined by commas [env: KVRING_LOG] [default: info for serve, error for bench and clear, else warn]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    // A command's help is all of its arguments' documentation: a line here would take its place.
    Serve(serve::Args),
    Status(status::Args),
    Clear(clear::Args),
    Remove(remove::Args),
    Replay(kvring_benches::ReplayArgs),
    Chaos(kvring_benches::ChaosArgs),
    Bench(kvring_benches::BenchArgs),
    Simulate(kvring_benches::SimulateArgs),
}

/// As `clap` has it.
const WRONG_USAGE: u8 = 2;

fn main() -> ExitCode {
    // The other processes of a replay, of chaos or of a benchmark are this executable again.
    kvring_benches::child_main(|level| console::LogChoice::new(None)?.start(level));
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            // In one piece: several processes share standard error.
            console::say(&format!("error: {error:#}"));
            if error.is::<flags::WrongUsage>() { ExitCode::from(WRONG_USAGE) } else { ExitCode::FAILURE }
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let log = console::LogChoice::new(cli.log_level)?;
    match cli.command {
        // The engine's level may also come from its configuration file.
        Command::Serve(args) => serve::run(args, &log)?,
        Command::Status(args) => {
            log.start("warn")?;
            return status::run(&args);
        }
        Command::Clear(args) => {
            log.start("error")?;
            clear::run(&args)?;
        }
        Command::Remove(args) => {
            log.start("warn")?;
            remove::run(&args)?;
        }
        Command::Replay(args) => {
            log.start("warn")?;
            args.check().map_err(flags::wrong)?;
            return kvring_benches::replay(args, &log.console()).map(exit_code);
        }
        Command::Chaos(args) => {
            // Everything that it logs is in its report as well.
            log.start("off")?;
            return kvring_benches::chaos(&args, &log.console()).map(exit_code);
        }
        Command::Bench(args) => {
            // Its engines come and go, so what their clients say about that is not news.
            log.start("error")?;
            args.check().map_err(flags::wrong)?;
            kvring_benches::bench(args, &log.console())?;
        }
        Command::Simulate(args) => {
            log.start("warn")?;
            kvring_benches::simulate(args, &log.console())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether nothing was wrong, as an exit code.
fn exit_code(all_is_well: bool) -> ExitCode {
    if all_is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_explains_itself_in_its_help() {
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let name = command.get_name();
            let explained = command.get_long_about().map(ToString::to_string).unwrap_or_default();
            assert!(
                explained.lines().count() > 2,
                "{name}: more than the line that the list of commands has: {explained}"
            );
        }
    }
}

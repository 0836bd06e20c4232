//! `kvring bench` without the rest of the command: `cargo run --release -p kvring-benches --example bench -- rtt`.

/// The arguments of the benchmark alone.
#[derive(clap::Parser)]
struct Args {
    #[command(flatten)]
    bench: kvring_benches::BenchArgs,
}

fn main() -> anyhow::Result<()> {
    kvring_benches::child_main();
    let args = <Args as clap::Parser>::parse();
    args.bench.check()?;
    #[allow(clippy::disallowed_methods, reason = "an example: whoever stops reading sees an error")]
    kvring_benches::run(args.bench, || Box::new(std::io::stdout()))
}

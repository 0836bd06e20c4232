//! A client of a kvring engine. It stores two chunks of a KV cache, looks them up, loads them into other blocks of the
//! cache, and compares the bytes. Start an engine in one terminal, and the client in another one:
//!
//! ```text
//! cargo run --release -- serve --name example --arena 64MiB
//! cargo run --release -p kvring-adapter --example client example
//! ```
//!
//! `client.py` does the same in Python.

use kvring_adapter::{
    Client, ClientOptions, DEFAULT_ENGINE, Key, LoadChunk, PagedKv, Plane, PollingSchedulerAdapter, Role,
    Round, SchedulerOptions, StoreChunk, WorkerAdapter, WorkerOptions,
};
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

/// The bytes that one block of tokens takes in the KV cache.
const BLOCK: usize = 4096;
/// How long this example waits for the engine, which a slow machine may take long to run.
const PATIENCE: Duration = Duration::from_secs(3600);

fn main() -> ExitCode {
    let engine = std::env::args().nth(1).unwrap_or_else(|| DEFAULT_ENGINE.to_owned());
    match store_and_load(&engine) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn store_and_load(engine: &str) -> Result<(), Box<dyn Error>> {
    // A namespace is named by a digest of all that decides what the bytes mean: the model, its weights, the dtype.
    let fingerprint = [1, 2, 3, 4];
    // A chunk is named by a key: usually a digest of all tokens up to the chunk's end.
    let keys: [Key; 2] = [[10, 0], [20, 0]];
    // The KV cache: four blocks in one tensor. Here a chunk is one block. The first two blocks have been computed.
    let mut cache = [vec![b'a'; BLOCK], vec![b'b'; BLOCK], vec![0; 2 * BLOCK]].concat();

    // Attach. A client finds its engine by name; one that finds none waits for it, so this asks first whether it is there.
    let options = ClientOptions {
        engine: engine.to_owned(),
        operation_timeout: PATIENCE,
        stall_after: PATIENCE,
        ..ClientOptions::default()
    };
    let client = Client::new(Role::Worker, options.clone())?;
    if let Some(why) = client.diagnose() {
        return Err(format!("expected an engine named {engine} that serves, but {why}").into());
    }

    // A worker stores and loads. It is told once where the KV cache lies; the engine never sees these addresses.
    let mut worker = WorkerAdapter::new(&client, WorkerOptions::new(fingerprint, 1, 0, 16))?;
    let plane = Plane { base: cache.as_mut_ptr(), block_stride: BLOCK, page_bytes: BLOCK };
    // SAFETY: the plane is `cache`, which lives on, and which nobody else touches until the worker has been shut down.
    worker.register_kv_caches(unsafe { PagedKv::new(vec![plane], 4, 1) }?)?;
    client.wait_ready(PATIENCE).map_err(|health| health.explain(engine))?;

    // Store the chunks from blocks 0 and 1, in the background. A round is one store of a chunk by all its ranks.
    let chunks = keys.iter().zip([0, 1]).map(|(key, block)| StoreChunk { key: *key, blocks: vec![block] });
    let job =
        worker.submit_store("request 1", Round { source: 1, number: 1 }, None, chunks.collect(), None)?;
    worker.wait_job(job, PATIENCE);

    // Look them up. A scheduler does this, with a client of its own, usually in another process.
    let client = Client::new(Role::Scheduler, options)?;
    client.wait_ready(PATIENCE).map_err(|health| health.explain(engine))?;
    let mut scheduler = PollingSchedulerAdapter::new(&client, SchedulerOptions::new(fingerprint));
    let hit = scheduler.lookup("request 2", 0, &keys)?.clone();

    // Load what was found into blocks 2 and 3. Until the session ends, the engine keeps these chunks in place.
    let chunks = hit.handles().zip([2, 3]).map(|(chunk, block)| LoadChunk { chunk, blocks: vec![block] });
    let job = worker.submit_load("request 2", chunks.collect(), None)?;
    worker.wait_job(job, PATIENCE);
    scheduler.end_session("request 2");
    let finished = worker.get_finished();
    worker.shutdown();

    // Verify.
    let (computed, loaded) = cache.split_at(2 * BLOCK);
    if hit.chunks != 2 || computed != loaded {
        return Err(format!(
            "expected 2 chunks with the bytes that were stored, got {hit:?} and {finished:?}"
        )
        .into());
    }
    println!("stored, found and loaded {} chunks; their bytes are the same", hit.chunks);
    Ok(())
}

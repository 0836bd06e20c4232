//! The engine of a replay: `kvring serve` in a process of its own, and what its statistics say.

use crate::children::kvring;
use crate::console::{self, LOG_ENV, LogChoice};
use crate::serve::READY_LINE;
use anyhow::{Context, anyhow, bail};
use kvring_adapter::EngineView;
use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_engine::policy::PolicyKind;
use kvring_engine::segments;
use kvring_engine::stats::{Snapshot, Stat};
use kvring_rig::child::Process;
use kvring_rig::pipe::{self, Abort};
use kvring_rig::shm;
use kvring_shm_abi::segment::EngineName;
use nix::sys::signal::Signal;
use std::fs::File;
use std::io::Read;
use std::process::{ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long an engine may take until it serves; its first slab is allocated before that.
const READY_MAX: Duration = Duration::from_secs(30);
/// How long the allocation of the arena may stand still.
const ALLOCATION_MAX: Duration = Duration::from_secs(30);
/// How long the engine may take to end, with everything unlinked.
const STOP_MAX: Duration = Duration::from_secs(20);
/// How long statistics may take to come to rest after the last request.
const SETTLE_MAX: Duration = Duration::from_secs(3);

/// A running engine; its segments are removed when it is dropped, whatever happened.
pub(super) struct Engine {
    process: Process,
    name: EngineName,
    view: EngineView,
}

impl Engine {
    /// Starts an engine of this arena and policy, and waits until it serves.
    pub(super) fn start(
        name: EngineName,
        arena: ByteSize,
        policy: PolicyKind,
        log: &LogChoice,
        abort: &Abort,
    ) -> anyhow::Result<Engine> {
        let parent = std::process::id().to_string();
        let mut command = kvring("serve")?;
        command
            .args(["--name", name.as_str(), "--arena", &arena.to_string(), "--policy", policy.name()])
            .args(["--stop-with-parent", &parent])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // Its own notes are of no interest here, unless the user asks for them.
            .env(LOG_ENV, "warn");
        let stderr = log.hand_to(&mut command);
        let mut process = Process::start("the engine".to_owned(), command, stderr)?;
        let ready = wait_for_ready(&mut process, abort).and_then(|()| Ok(EngineView::open(&name)?));
        match ready {
            Ok(view) => Ok(Engine { process, name, view }),
            Err(error) => {
                let error = process.explain(error);
                drop(process);
                shm::sweep(&name);
                Err(error)
            }
        }
    }

    /// Waits until the whole arena is allocated: so that its capacity is the same from the first request on.
    pub(super) fn wait_allocated(&mut self, abort: &Abort) -> anyhow::Result<()> {
        let total = self.view.identity.geometry.arena_bytes;
        let bar = console::byte_bar("allocating the arena", total);
        let mut last = (0, Instant::now());
        loop {
            let stats = self.stats()?;
            let allocated = stats.get(Stat::ArenaBytesAllocated);
            bar.set_position(allocated);
            if allocated >= total {
                break;
            }
            self.check(abort)?;
            if allocated != last.0 {
                last = (allocated, Instant::now());
            }
            if stats.get(Stat::AllocationStalled) != 0 || last.1.elapsed() > ALLOCATION_MAX {
                bail!(
                    "{} of {} of the arena are allocated, and there is no room for more; use a smaller --arena",
                    ByteSize(allocated).human(),
                    ByteSize(total).human()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// An error if the engine has ended, or the user has interrupted us.
    pub(super) fn check(&mut self, abort: &Abort) -> anyhow::Result<()> {
        if self.process.ended().is_some() {
            return Err(self.process.explain(anyhow!("nobody had told it to end")));
        }
        if abort.is_interrupted() {
            bail!("interrupted");
        }
        Ok(())
    }

    /// All statistics now.
    pub(super) fn stats(&self) -> anyhow::Result<Snapshot> {
        Ok(Snapshot::read(&self.view.segment.stats)?)
    }

    /// The statistics once they are as they should be, or as they are after [`SETTLE_MAX`].
    pub(super) fn settled(&self, at_rest: impl Fn(&Snapshot) -> bool) -> anyhow::Result<Snapshot> {
        // Gauges are published with the beat: what is read after two more beats is not from before this call.
        let beat = self.view.segment.epoch().beat();
        let until = Instant::now() + SETTLE_MAX;
        loop {
            let stats = self.stats()?;
            let fresh = self.view.segment.epoch().beat().wrapping_sub(beat) >= 2;
            if (fresh && at_rest(&stats)) || Instant::now() >= until {
                return Ok(stats);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Slots that the arena has for shards of the one size that a replay uses: in spans, and in slabs not used yet.
    pub(super) fn slots(&self, stats: &Snapshot) -> u64 {
        let slab_bytes = self.view.identity.geometry.slab_bytes;
        let free_slabs = stats.get(Stat::SlabsFree);
        let used_slabs = (stats.get(Stat::ArenaBytesAllocated) / slab_bytes).saturating_sub(free_slabs);
        let slots =
            stats.get(Stat::SlotsFree) + stats.get(Stat::SlotsWriting) + stats.get(Stat::SlotsCommitted);
        slots + free_slabs * slots / used_slabs.max(1)
    }

    /// Negative control: flips a bit in every page of the arena, behind everybody's back.
    pub(super) fn corrupt(&self) -> anyhow::Result<()> {
        shm::corrupt(&self.name, self.view.identity.geometry.arena_bytes)
    }

    /// Negative control: `kill -9`.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        self.process.child().kill().context("killing the engine")
    }

    /// Its name.
    pub(super) fn name(&self) -> &EngineName {
        &self.name
    }

    /// Ends it as a user would.
    ///
    /// # Errors
    /// It does not end well, or leaves something behind.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        self.terminate();
        self.process.succeed()?;
        let left = segments::remove(&self.name, true, EngineConfig::default().start_wait())?;
        if left.segments > 0 {
            bail!("the engine has ended, and left {} segments ({} bytes) behind", left.segments, left.bytes);
        }
        Ok(())
    }

    fn terminate(&mut self) -> Option<ExitStatus> {
        if let Some(status) = self.process.ended() {
            return Some(status);
        }
        self.process.signal(Signal::SIGTERM);
        self.process.wait(STOP_MAX)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.terminate().is_none() {
            let _ = self.process.child().kill();
            let _ = self.process.child().wait();
        }
        shm::sweep(&self.name);
    }
}

fn wait_for_ready(process: &mut Process, abort: &Abort) -> anyhow::Result<()> {
    let stdout = process.child().stdout.take().context("the engine's stdout")?;
    let mut stdout = File::from(std::os::fd::OwnedFd::from(stdout));
    let deadline = Instant::now() + READY_MAX;
    let mut said = Vec::new();
    while !said.ends_with(b"\n") {
        pipe::wait_readable(&stdout, deadline, abort).context("waiting for the engine to serve")?;
        let mut bytes = [0; 64];
        let read = stdout.read(&mut bytes).context("reading from the engine")?;
        if read == 0 {
            bail!("it ended before it served");
        }
        said.extend_from_slice(&bytes[..read]);
    }
    let line = String::from_utf8_lossy(&said);
    if line.trim_end() != READY_LINE {
        bail!("expected {READY_LINE:?} from the engine, got {:?}", line.trim_end());
    }
    Ok(())
}

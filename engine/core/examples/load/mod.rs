//! What the load generators have in common: the job, which request comes next, and the line of JSON at the end.

use std::io::{Error, ErrorKind, Result};
use std::time::{Duration, Instant};

#[derive(Clone, Copy)]
pub struct Job {
    random: bool,
    /// Number of writes among 256 requests.
    writes: u64,
    /// After each write.
    pub flush: bool,
    /// Once, after all requests.
    pub end_flush: bool,
    pub block: usize,
    /// Requests in flight per connection or queue.
    pub depth: usize,
    blocks: u64,
    /// None: as many requests as the device has blocks.
    time: Option<Duration>,
}

impl Job {
    /// The arguments `PATTERN BLOCK DEPTH CONNECTIONS SIZE SECONDS`; the job and the number of connections.
    pub fn parse(arguments: &[String]) -> Result<(Job, usize)> {
        let [pattern, numbers @ ..] = arguments else { return Err(ErrorKind::InvalidInput.into()) };
        let numbers: Vec<f64> = numbers.iter().map(|text| text.parse().map_err(Error::other)).collect::<Result<_>>()?;
        let &[block, depth, connections, size, seconds] = &numbers[..] else {
            return Err(ErrorKind::InvalidInput.into());
        };
        let end_flush = pattern.ends_with("-end-flush");
        let flush = !end_flush && pattern.ends_with("-flush");
        let (random, writes) = match pattern.split('-').next() {
            Some("read") => (false, 0),
            Some("write") => (false, 256),
            Some("randread") => (true, 0),
            Some("randwrite") => (true, 256),
            Some("randrw") => (true, 128),
            _ => return Err(Error::new(ErrorKind::InvalidInput, format!("{pattern}: no such pattern"))),
        };
        let job = Job {
            random,
            writes,
            flush,
            end_flush,
            block: block as usize,
            depth: depth as usize,
            blocks: (size / block) as u64,
            time: (seconds > 0.0).then(|| Duration::from_secs_f64(seconds)),
        };
        if job.block == 0 || job.depth == 0 || job.blocks == 0 || connections < 1.0 {
            let least = "a block, a request in flight, a connection and a device of a block at least";
            return Err(Error::new(ErrorKind::InvalidInput, least));
        }
        Ok((job, connections as usize))
    }

    /// Data to write; it is the same everywhere, and never looked at.
    pub fn payload(&self) -> impl Iterator<Item = u8> + Clone {
        (0..self.block).map(|at| (at * 37 % 251) as u8)
    }
}

/// A request to be sent.
pub struct Next {
    pub write: bool,
    pub offset: u64,
}

/// A run of a job, over all connections.
pub struct Run {
    pub job: Job,
    started: Instant,
    cpu: f64,
    begun: u64,
    state: u64,
    pub errors: u64,
    pub latencies: Vec<Duration>,
}

impl Run {
    /// It starts now.
    pub fn start(job: Job) -> Result<Run> {
        Ok(Run {
            job,
            started: Instant::now(),
            cpu: cpu_seconds()?,
            begun: 0,
            state: 0x9e37_79b9_7f4a_7c15,
            errors: 0,
            latencies: Vec::with_capacity(1 << 20),
        })
    }

    /// The next request; None: nothing new is begun any more. The offsets are the same in each run.
    pub fn next(&mut self, now: Instant) -> Option<Next> {
        if self.job.time.map_or(self.begun >= self.job.blocks, |time| now - self.started >= time) {
            return None;
        }
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let number = if self.job.random { self.state >> 8 } else { self.begun } % self.job.blocks;
        self.begun += 1;
        Some(Next { write: self.state & 255 < self.job.writes, offset: number * self.job.block as u64 })
    }

    /// Ends now; prints one line of JSON.
    pub fn report(mut self) -> Result<()> {
        let seconds = self.started.elapsed().as_secs_f64();
        let busy = (cpu_seconds()? - self.cpu) / seconds;
        self.latencies.sort_unstable();
        let at = |share: f64| self.latencies[((self.latencies.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
        println!(
            "{{\"operations\": {}, \"seconds\": {seconds}, \"errors\": {}, \"p50_us\": {}, \"p99_us\": {}, \"busy\": {busy}}}",
            self.latencies.len(),
            self.errors,
            at(0.5),
            at(0.99),
        );
        Ok(())
    }
}

/// Of this thread, which is all there is. Source: the kernel's Documentation/scheduler/sched-stats, whose unit is the
/// nanosecond; those of proc_pid_stat(5) are too long for this.
fn cpu_seconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/schedstat")?;
    let running: f64 = text.split(' ').next().and_then(|word| word.parse().ok()).ok_or(ErrorKind::InvalidData)?;
    Ok(running / 1e9)
}

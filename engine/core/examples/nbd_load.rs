//! Load generator for NBD servers with little overhead. It sends and receives many requests per system call, and sleeps
//! in epoll when it has nothing to do, as a client in a kernel or in a virtual machine does. fio's nbd engine sends and
//! receives one request at a time, which often limits its results.
//!
//! One thread, any number of connections with simple replies, nonblocking in both directions. Prints one line of JSON.
//! Arguments: SOCKET EXPORT PATTERN BLOCK DEPTH CONNECTIONS SIZE SECONDS
//!
//! EXPORT: name, "" for the default export. PATTERN: read, write, randread, randwrite or randrw (half of each). With
//! the suffix `-flush` a flush follows each write, in the same slot. With `-end-flush` one flush ends the run and is
//! part of its time. BLOCK: bytes per request. DEPTH: requests in flight per connection. SIZE: bytes of the device to
//! use. SECONDS: duration; 0: until SIZE bytes are read or written. The offsets are the same in each run.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, IoSlice, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use blkloom_wire::{Header, Style};
use rustix::event::epoll;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const GO: u32 = 7;
const ACKNOWLEDGED: u32 = 1;
const INFORMATION: u32 = 3;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const REPLY: [u8; 4] = 0x6744_6698u32.to_be_bytes();
const REPLY_SIZE: usize = 16;
const HEADER_SIZE: usize = 28;
/// Most bytes per receive call.
const INPUT: usize = 256 << 10;
/// IOV_MAX; see writev(2).
const MOST_SLICES: usize = 1024;

#[derive(Clone, Copy)]
struct Job {
    random: bool,
    /// Number of writes among 256 requests.
    writes: u64,
    /// After each write.
    flush: bool,
    /// Once, after all requests.
    end_flush: bool,
    block: usize,
    depth: usize,
    blocks: u64,
    /// None: as many requests as the device has blocks.
    time: Option<Duration>,
}

/// What the connections have in common.
struct Run {
    job: Job,
    started: Instant,
    begun: u64,
    state: u64,
    errors: u64,
    latencies: Vec<Duration>,
}

#[derive(Clone, Copy)]
struct Slot {
    kind: u16,
    since: Instant,
}

struct Client {
    server: UnixStream,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Requests not wholly sent: header, and whether a payload follows it.
    output: VecDeque<([u8; HEADER_SIZE], bool)>,
    /// Bytes of the first of them that were sent.
    sent: usize,
    /// Bytes of a read's data that have not arrived.
    data: usize,
    /// The beginning of a reply's header.
    partial: Vec<u8>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, export, pattern, numbers @ ..] = &arguments[..] else { return Err(ErrorKind::InvalidInput.into()) };
    let numbers: Vec<f64> = numbers.iter().map(|text| text.parse().map_err(Error::other)).collect::<Result<_>>()?;
    let &[block, depth, connections, size, seconds] = &numbers[..] else { return Err(ErrorKind::InvalidInput.into()) };
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
    let mut clients: Vec<Client> =
        (0..connections as usize).map(|_| Client::connect(socket, export, job.depth)).collect::<Result<_>>()?;
    let cpu = cpu_seconds()?;
    let mut run = Run {
        job,
        started: Instant::now(),
        begun: 0,
        state: 0x9e37_79b9_7f4a_7c15,
        errors: 0,
        latencies: Vec::with_capacity(1 << 20),
    };
    run.all(&mut clients)?;
    if job.end_flush {
        run.errors += u64::from(!clients[0].flush()?);
    }
    let seconds = run.started.elapsed().as_secs_f64();
    let busy = (cpu_seconds()? - cpu) / seconds;
    run.latencies.sort_unstable();
    let at = |share: f64| run.latencies[((run.latencies.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    println!(
        "{{\"operations\": {}, \"seconds\": {seconds}, \"errors\": {}, \"p50_us\": {}, \"p99_us\": {}, \"busy\": {busy}}}",
        run.latencies.len(),
        run.errors,
        at(0.5),
        at(0.99),
    );
    clients.into_iter().try_for_each(Client::disconnect)
}

/// Of this thread, which is all there is. Source: the kernel's Documentation/scheduler/sched-stats, whose unit is the
/// nanosecond; those of proc_pid_stat(5) are too long for this.
fn cpu_seconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/schedstat")?;
    let running: f64 = text.split(' ').next().and_then(|word| word.parse().ok()).ok_or(ErrorKind::InvalidData)?;
    Ok(running / 1e9)
}

impl Run {
    /// Runs the job to its end over all connections.
    fn all(&mut self, clients: &mut [Client]) -> Result<()> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Edge-triggered: each direction is driven until it would wait.
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        // Written data is the same everywhere, and never looked at.
        let payload: Vec<u8> = (0..self.job.block).map(|at| (at * 37 % 251) as u8).collect();
        let mut input = vec![0; INPUT];
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        for (index, client) in clients.iter_mut().enumerate() {
            epoll::add(&epoll, &client.server, epoll::EventData::new_u64(index as u64), interest)?;
            self.refill(client);
            client.send(&payload)?;
        }
        while clients.iter().any(|client| client.free.len() < self.job.depth) {
            let ready = match epoll::wait(&epoll, &mut events, None) {
                Ok((ready, _)) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            for event in ready.iter() {
                let client = &mut clients[event.data.u64() as usize];
                while client.receive(&mut input, self)? {
                    self.refill(client);
                    client.send(&payload)?;
                }
                client.send(&payload)?;
            }
        }
        Ok(())
    }

    /// Nothing new is begun any more.
    fn is_over(&self, now: Instant) -> bool {
        self.job.time.map_or(self.begun >= self.job.blocks, |time| now - self.started >= time)
    }

    fn refill(&mut self, client: &mut Client) {
        let now = Instant::now();
        while !self.is_over(now)
            && let Some(slot) = client.free.pop()
        {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            let number = if self.job.random { self.state >> 8 } else { self.begun } % self.job.blocks;
            let kind = if self.state & 255 < self.job.writes { WRITE } else { READ };
            let length = self.job.block as u64;
            client.request(slot, kind, number * length, length, now);
            self.begun += 1;
        }
    }
}

impl Client {
    fn connect(socket: &str, export: &str, depth: usize) -> Result<Client> {
        let mut server = UnixStream::connect(socket)?;
        handshake(&mut server, export)?;
        server.set_nonblocking(true)?;
        Ok(Client {
            server,
            slots: vec![None; depth],
            free: (0..depth).collect(),
            output: VecDeque::new(),
            sent: 0,
            data: 0,
            partial: Vec::new(),
        })
    }

    fn request(&mut self, slot: usize, kind: u16, offset: u64, length: u64, since: Instant) {
        let mut header = Vec::with_capacity(HEADER_SIZE);
        Header { flags: 0, kind, cookie: slot as u64, offset, length }.put(Style::Simple, &mut header);
        let mut bytes = [0; HEADER_SIZE];
        bytes.copy_from_slice(&header);
        self.output.push_back((bytes, kind == WRITE));
        self.slots[slot] = Some(Slot { kind, since });
    }

    /// Sends what the socket takes.
    fn send(&mut self, payload: &[u8]) -> Result<()> {
        while !self.output.is_empty() {
            let requests = self.output.iter().take(MOST_SLICES / 2);
            let mut slices: Vec<IoSlice> = requests
                .flat_map(|(header, with_payload)| [&header[..], if *with_payload { payload } else { &[] }])
                .map(IoSlice::new)
                .collect();
            let mut left = &mut slices[..];
            IoSlice::advance_slices(&mut left, self.sent);
            let mut count = match self.server.write_vectored(left) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other? + self.sent,
            };
            while let Some((_, with_payload)) = self.output.front() {
                let whole = HEADER_SIZE + if *with_payload { payload.len() } else { 0 };
                if count < whole {
                    break;
                }
                count -= whole;
                self.output.pop_front();
            }
            self.sent = count;
        }
        Ok(())
    }

    /// Receives once; whether anything came.
    fn receive(&mut self, input: &mut [u8], run: &mut Run) -> Result<bool> {
        let mut bytes: &[u8] = loop {
            match self.server.read(input) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => break &input[..count],
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        let now = Instant::now();
        loop {
            let data = self.data.min(bytes.len());
            self.data -= data;
            bytes = &bytes[data..];
            let header = (REPLY_SIZE - self.partial.len()).min(bytes.len());
            if header == 0 {
                return Ok(true);
            }
            self.partial.extend_from_slice(&bytes[..header]);
            bytes = &bytes[header..];
            if self.partial.len() == REPLY_SIZE {
                self.reply(now, run)?;
                self.partial.clear();
            }
        }
    }

    /// A reply's header has arrived.
    fn reply(&mut self, now: Instant, run: &mut Run) -> Result<()> {
        if self.partial[..4] != REPLY {
            return Err(Error::other("this is no simple reply"));
        }
        let failed = self.partial[4..8] != [0; 4];
        let index = self.partial[8..].iter().fold(0, |cookie, &byte| cookie << 8 | usize::from(byte));
        let slot = self.slots.get_mut(index).and_then(Option::take);
        let Slot { kind, since } = slot.ok_or_else(|| Error::other("a reply to no request"))?;
        run.errors += u64::from(failed);
        if kind == READ && !failed {
            self.data = run.job.block;
        }
        if kind == WRITE && run.job.flush {
            self.request(index, FLUSH, 0, 0, since);
        } else {
            run.latencies.push(now - since);
            self.free.push(index);
        }
        Ok(())
    }

    /// Flushes the device, with nothing else in flight; whether the server could.
    fn flush(&mut self) -> Result<bool> {
        self.server.set_nonblocking(false)?;
        let mut header = Vec::with_capacity(HEADER_SIZE);
        Header { flags: 0, kind: FLUSH, cookie: 0, offset: 0, length: 0 }.put(Style::Simple, &mut header);
        self.server.write_all(&header)?;
        let reply = take::<REPLY_SIZE>(&mut self.server)?;
        if reply[..4] != REPLY {
            return Err(Error::other("this is no simple reply"));
        }
        Ok(reply[4..8] == [0; 4])
    }

    fn disconnect(mut self) -> Result<()> {
        self.server.set_nonblocking(false)?;
        let mut header = Vec::with_capacity(HEADER_SIZE);
        Header { flags: 0, kind: DISCONNECT, cookie: 0, offset: 0, length: 0 }.put(Style::Simple, &mut header);
        self.server.write_all(&header)
    }
}

fn take<const N: usize>(server: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    server.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Fixed newstyle.
fn handshake(server: &mut UnixStream, export: &str) -> Result<()> {
    let _greeting = take::<18>(server)?;
    let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), &[0; 2]].concat();
    let option = [&OPTION_MAGIC.to_be_bytes()[..], &GO.to_be_bytes(), &(name.len() as u32).to_be_bytes(), &name];
    server.write_all(&[&3u32.to_be_bytes()[..], &option.concat()].concat())?;
    loop {
        let _magic_and_option = take::<12>(server)?;
        let kind = u32::from_be_bytes(take(server)?);
        let mut data = vec![0; u32::from_be_bytes(take(server)?) as usize];
        server.read_exact(&mut data)?;
        match kind {
            ACKNOWLEDGED => return Ok(()),
            INFORMATION => {}
            _ => return Err(Error::other(format!("the server answered NBD_OPT_GO with {kind:#x}"))),
        }
    }
}

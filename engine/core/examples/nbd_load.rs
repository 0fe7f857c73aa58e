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
use std::time::Instant;

use blkloom_wire::{Header, Style};
use rustix::event::epoll;

mod load;

use load::{Job, Run};

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
    let [socket, export, rest @ ..] = &arguments[..] else { return Err(ErrorKind::InvalidInput.into()) };
    let (job, connections) = Job::parse(rest)?;
    let mut clients: Vec<Client> =
        (0..connections).map(|_| Client::connect(socket, export, job.depth)).collect::<Result<_>>()?;
    let mut run = Run::start(job)?;
    run_all(&mut run, &mut clients)?;
    if job.end_flush {
        run.errors += u64::from(!clients[0].flush()?);
    }
    run.report()?;
    clients.into_iter().try_for_each(Client::disconnect)
}

/// Runs the job to its end over all connections.
fn run_all(run: &mut Run, clients: &mut [Client]) -> Result<()> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    // Edge-triggered: each direction is driven until it would wait.
    let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    let payload: Vec<u8> = run.job.payload().collect();
    let mut input = vec![0; INPUT];
    let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
    for (index, client) in clients.iter_mut().enumerate() {
        epoll::add(&epoll, &client.server, epoll::EventData::new_u64(index as u64), interest)?;
        client.refill(run);
        client.send(&payload)?;
    }
    while clients.iter().any(|client| client.free.len() < run.job.depth) {
        let ready = match epoll::wait(&epoll, &mut events, None) {
            Ok((ready, _)) => ready,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for event in ready.iter() {
            let client = &mut clients[event.data.u64() as usize];
            while client.receive(&mut input, run)? {
                client.refill(run);
                client.send(&payload)?;
            }
            client.send(&payload)?;
        }
    }
    Ok(())
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

    fn refill(&mut self, run: &mut Run) {
        let now = Instant::now();
        while let Some(&slot) = self.free.last()
            && let Some(next) = run.next(now)
        {
            self.free.pop();
            let kind = if next.write { WRITE } else { READ };
            self.request(slot, kind, next.offset, run.job.block as u64, now);
        }
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

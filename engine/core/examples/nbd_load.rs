//! A load generator for NBD servers that spends little itself: it sends what it has to send together and takes all
//! replies that have come, as a client in a kernel or a virtual machine may. `make bench` uses it where fio, which sends
//! and receives request by request, is what limits the figures.
//!
//! Writes blocks, in order or at random (repeatably, and some more than once), with a number of requests in flight, over
//! a connection with simple replies. Prints a line of JSON. Arguments: the path of a Unix socket, `write` or `randwrite`,
//! bytes a block, requests in flight, bytes of the device, and seconds (0: until as many bytes are written). Sending
//! waits for nobody: with hundreds of requests in flight a server that does so, too, and it might wait for each other.

use std::fs;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use blkloom_wire::{Header, Style};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const GO: u32 = 7;
const ACKNOWLEDGED: u32 = 1;
const INFORMATION: u32 = 3;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const REPLY: [u8; 4] = 0x6744_6698u32.to_be_bytes();
const REPLY_SIZE: usize = 16;

struct Job {
    random: bool,
    block: usize,
    depth: usize,
    blocks: u64,
    /// None: as many blocks as the device has.
    time: Option<Duration>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, pattern, numbers @ ..] = &arguments[..] else { return Err(ErrorKind::InvalidInput.into()) };
    let numbers: Vec<f64> = numbers.iter().map(|text| text.parse().map_err(Error::other)).collect::<Result<_>>()?;
    let &[block, depth, size, seconds] = &numbers[..] else { return Err(ErrorKind::InvalidInput.into()) };
    let job = Job {
        random: match &pattern[..] {
            "write" => false,
            "randwrite" => true,
            _ => return Err(Error::new(ErrorKind::InvalidInput, format!("{pattern}: neither write nor randwrite"))),
        },
        block: block as usize,
        depth: depth as usize,
        blocks: (size / block) as u64,
        time: (seconds > 0.0).then(|| Duration::from_secs_f64(seconds)),
    };
    if job.block == 0 || job.depth == 0 || job.blocks == 0 {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "a block, a request in flight and a device of a block at least",
        ));
    }
    let mut server = UnixStream::connect(socket)?;
    handshake(&mut server)?;
    let (began, cpu) = (Instant::now(), cpu_seconds()?);
    let (mut latencies, errors) = load(&mut server, &job)?;
    let seconds = began.elapsed().as_secs_f64();
    let busy = (cpu_seconds()? - cpu) / seconds;
    latencies.sort_unstable();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    println!(
        "{{\"operations\": {}, \"seconds\": {seconds}, \"errors\": {errors}, \"p50_us\": {}, \"p99_us\": {}, \"busy\": {busy}}}",
        latencies.len(),
        at(0.5),
        at(0.99),
    );
    Ok(())
}

/// Of this thread, which is all there is. Source: the kernel's Documentation/scheduler/sched-stats, whose unit is the
/// nanosecond; those of proc_pid_stat(5) are too long for this.
fn cpu_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/self/schedstat")?;
    let running: f64 = text.split(' ').next().and_then(|word| word.parse().ok()).ok_or(ErrorKind::InvalidData)?;
    Ok(running / 1e9)
}

fn take<const N: usize>(server: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    server.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Fixed newstyle, the default export.
fn handshake(server: &mut UnixStream) -> Result<()> {
    let _greeting = take::<18>(server)?;
    let go = [&3u32.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &GO.to_be_bytes(), &6u32.to_be_bytes(), &[0; 6]];
    server.write_all(&go.concat())?;
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

/// The time each request took, and how many failed.
fn load(server: &mut UnixStream, job: &Job) -> Result<(Vec<Duration>, u64)> {
    let mut latencies = Vec::with_capacity(1 << 20);
    let (mut errors, mut state) = (0, 0x9e37_79b9_7f4a_7c15u64);
    let mut sent: Vec<Option<Instant>> = vec![None; job.depth];
    let mut free: Vec<usize> = (0..job.depth).collect();
    let unit = Style::Simple.header_size() + job.block;
    // What is written is there already; only headers are put before it.
    let mut output: Vec<u8> = (0..job.depth * unit).map(|at| (at * 37 % 251) as u8).collect();
    let (mut begun, mut header) = (0, Vec::with_capacity(unit - job.block));
    let (mut input, mut have) = (vec![0; job.depth * REPLY_SIZE], 0);
    let start = Instant::now();
    loop {
        let over = job.time.map_or(begun >= job.blocks, |time| start.elapsed() >= time);
        if over && free.len() == job.depth {
            break;
        }
        let (now, mut used) = (Instant::now(), 0);
        while let Some(slot) = free.pop_if(|_| !over && (job.time.is_some() || begun < job.blocks)) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let number = if job.random { state } else { begun } % job.blocks;
            let (offset, length) = (number * job.block as u64, job.block as u64);
            header.clear();
            Header { flags: 0, kind: WRITE, cookie: slot as u64, offset, length }.put(Style::Simple, &mut header);
            output[used..used + header.len()].copy_from_slice(&header);
            used += unit;
            sent[slot] = Some(now);
            begun += 1;
        }
        server.write_all(&output[..used])?;
        match server.read(&mut input[have..])? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => have += count,
        }
        let now = Instant::now();
        let whole = have / REPLY_SIZE * REPLY_SIZE;
        for reply in input[..whole].chunks_exact(REPLY_SIZE) {
            if reply[..4] != REPLY {
                return Err(Error::other("this is no simple reply"));
            }
            errors += u64::from(reply[4..8] != [0; 4]);
            let slot = reply[8..].iter().fold(0, |cookie, &byte| cookie << 8 | usize::from(byte));
            let asked = sent.get_mut(slot).and_then(Option::take);
            latencies.push(now - asked.ok_or_else(|| Error::other("nobody waits for this reply"))?);
            free.push(slot);
        }
        input.copy_within(whole..have, 0);
        have -= whole;
    }
    header.clear();
    Header { flags: 0, kind: DISCONNECT, cookie: 0, offset: 0, length: 0 }.put(Style::Simple, &mut header);
    server.write_all(&header)?;
    Ok((latencies, errors))
}

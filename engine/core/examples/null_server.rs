//! NBD server without storage: a read returns the bytes that are in its buffer, a write is discarded.
//!
//! Its throughput is the limit of the client, the socket and the machine, because no server with storage can be faster.
//! `make bench` measures it beside the other servers. Like the engine it receives all requests, answers them by one
//! send, and polls before it sleeps. It supports structured replies, as all measured servers do. One thread per
//! connection. It gets a listening Unix socket as descriptor 3 (sd_listen_fds(3)). Arguments: SIZE [FILE|memory]
//!
//! SIZE: bytes of the disk. FILE: each request is one read or write of this file. memory: each request is one copy. The
//! results are the limits of servers with such a disk.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::ptr::copy_nonoverlapping;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkloom_wire::{Framing, Sink, Style, read_data, success};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

const POLL: Duration = Duration::from_micros(50);
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN
const TRANSMISSION_FLAGS: u16 = 1 | 4 | 8 | 256;

fn main() -> Result<()> {
    let size = std::env::args().nth(1).and_then(|text| text.parse().ok()).ok_or(ErrorKind::InvalidInput)?;
    let disk = Arc::new(match std::env::args().nth(2).as_deref() {
        None => Disk::Nothing,
        Some("memory") => Disk::Memory(Memory(vec![1; size as usize].leak().as_mut_ptr())),
        Some(path) => Disk::File(File::options().read(true).write(true).open(path)?),
    });
    // SAFETY: by the convention above descriptor 3 belongs to this program, and no other code here uses it.
    let listener = unsafe { UnixListener::from_raw_fd(3) };
    for client in listener.incoming() {
        let client = client?;
        let disk = disk.clone();
        std::thread::spawn(move || {
            handshake(&client, size).and_then(|style| transmission(&client, style, size, &disk))
        });
    }
    Ok(())
}

fn number<const N: usize>(mut from: &UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn handshake(mut client: &UnixStream, size: u64) -> Result<Style> {
    let mut style = Style::Simple;
    client.write_all(&[b"NBDMAGIC".as_slice(), &OPTION_MAGIC.to_be_bytes(), &3u16.to_be_bytes()].concat())?;
    number::<4>(client)?;
    loop {
        let _magic = number::<8>(client)?;
        let option = u32::from_be_bytes(number(client)?);
        let mut data = vec![0; u32::from_be_bytes(number(client)?) as usize];
        client.read_exact(&mut data)?;
        let reply = |kind: u32, data: &[u8]| {
            let head = [&option.to_be_bytes()[..], &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes()].concat();
            client.try_clone()?.write_all(&[&REPLY_MAGIC.to_be_bytes()[..], &head, data].concat())
        };
        match option {
            6 | 7 => {
                let flags = TRANSMISSION_FLAGS.to_be_bytes();
                reply(3, &[&0u16.to_be_bytes()[..], &size.to_be_bytes(), &flags].concat())?;
                reply(1, &[])?;
                if option == 7 {
                    return Ok(style);
                }
            }
            8 => {
                reply(1, &[])?;
                style = Style::Structured;
            }
            _ => reply(1 << 31 | 1, &[])?,
        }
    }
}

/// The storage of the server.
enum Disk {
    Nothing,
    File(File),
    Memory(Memory),
}

/// Memory that all threads read and write concurrently, like a disk: the result of concurrent writes to one place is
/// undefined.
struct Memory(*mut u8);

// SAFETY: the memory is never freed, and threads access its bytes only by copying.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Disk {
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        match self {
            Disk::Nothing => {}
            Disk::File(file) => file.read_exact_at(into, offset)?,
            Disk::Memory(Memory(disk)) => {
                // SAFETY: the caller has checked that the range is inside the disk.
                unsafe { copy_nonoverlapping(disk.add(offset as usize), into.as_mut_ptr(), into.len()) }
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        match self {
            Disk::Nothing => {}
            Disk::File(file) => file.write_all_at(from, offset)?,
            Disk::Memory(Memory(disk)) => {
                // SAFETY: as in `read`.
                unsafe { copy_nonoverlapping(from.as_ptr(), disk.add(offset as usize), from.len()) }
            }
        }
        Ok(())
    }
}

fn transmission(mut client: &UnixStream, style: Style, size: u64, disk: &Disk) -> Result<()> {
    let (mut input, mut have) = (vec![0; 4 << 20], 0);
    let mut output = Output { buffer: vec![0; 32 << 20], used: 0 };
    loop {
        have += receive(client, &mut input[have..])?;
        let mut at = 0;
        while let Ok(Some(header)) = style.header(&input[at..have]) {
            let payload = if header.kind == 1 { header.length as usize } else { 0 };
            if matches!(header.kind, 0 | 1) && header.offset.checked_add(header.length).is_none_or(|end| end > size) {
                return Err(Error::other("a request beyond the end"));
            }
            if header.kind == 2 {
                return Ok(());
            }
            if input.len() < 28 + payload {
                return Err(Error::other("a write larger than the buffer"));
            }
            if have < at + 28 + payload {
                break;
            }
            let data = &input[at + 28..at + 28 + payload];
            at += 28 + payload;
            let framing = Framing { style, cookie: header.cookie, offset: header.offset };
            if header.kind == 0 {
                read_data(&framing, &mut output, header.offset, header.length, true);
                let end = output.used + header.length as usize;
                disk.read(header.offset, &mut output.buffer[output.used..end])?;
                output.used = end;
            } else {
                if header.kind == 1 {
                    disk.write(header.offset, data)?;
                }
                success(&framing, &mut output);
            }
        }
        input.copy_within(at..have, 0);
        have -= at;
        client.write_all(&output.buffer[..output.used])?;
        output.used = 0;
    }
}

/// Collects replies in a buffer. Its old contents are the data, so only the socket copies bytes.
struct Output {
    buffer: Vec<u8>,
    used: usize,
}

impl Sink for Output {
    fn put(&mut self, bytes: &[u8]) {
        self.buffer[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }
}

/// Receives some bytes. Polls for a while before it sleeps.
fn receive(client: &UnixStream, into: &mut [u8]) -> Result<usize> {
    let begun = Instant::now();
    loop {
        let flags = if begun.elapsed() < POLL { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
        match recv(client, &mut *into, flags) {
            Ok((0, _)) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok((got, _)) => return Ok(got),
            Err(Errno::AGAIN | Errno::INTR) => std::thread::yield_now(),
            Err(error) => return Err(error.into()),
        }
    }
}

//! An NBD server with nothing behind it: reads answer with whatever is in its buffer, writes vanish.
//!
//! What a client reaches against it is what the client, the socket and this machine can do at all, so
//! `make bench` measures it beside the others: no server with a disk behind it can be faster than one
//! without. It drains, answers everything in one send and polls before it sleeps, as the engine does,
//! and speaks structured replies to who asks for them, as all contenders do. A thread a connection; takes a
//! listening Unix socket as descriptor 3 (sd_listen_fds(3)). Argument: the size of the disk in bytes.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
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
    // SAFETY: descriptor 3 is ours by the convention above, and nothing else here uses it.
    let listener = unsafe { UnixListener::from_raw_fd(3) };
    for client in listener.incoming() {
        let client = client?;
        std::thread::spawn(move || handshake(&client, size).and_then(|style| transmission(&client, style)));
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

fn transmission(mut client: &UnixStream, style: Style) -> Result<()> {
    let (mut input, mut have) = (vec![0; 4 << 20], 0);
    let mut output = Output { buffer: vec![0; 32 << 20], used: 0 };
    loop {
        have += receive(client, &mut input[have..])?;
        let mut at = 0;
        while let Ok(Some(header)) = style.header(&input[at..have]) {
            let payload = if header.kind == 1 { header.length as usize } else { 0 };
            if header.kind == 2 {
                return Ok(());
            }
            if input.len() < 28 + payload {
                return Err(Error::other("a write larger than the buffer"));
            }
            if have < at + 28 + payload {
                break;
            }
            at += 28 + payload;
            let framing = Framing { style, cookie: header.cookie, offset: header.offset };
            if header.kind == 0 {
                read_data(&framing, &mut output, header.offset, header.length, true);
                output.used += header.length as usize;
            } else {
                success(&framing, &mut output);
            }
        }
        input.copy_within(at..have, 0);
        have -= at;
        client.write_all(&output.buffer[..output.used])?;
        output.used = 0;
    }
}

/// Replies gather in a buffer whose old contents are the data: nothing is moved but by the socket.
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

/// Some bytes; polls for a while before it sleeps.
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

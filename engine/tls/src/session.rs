//! `Session`: one TLS connection, first its handshake, then a stream of bytes.
//!
//! An error is final: every later call returns it again. The end of the socket without a closing message is an error;
//! bytes of an incomplete record are never delivered.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use blkloom_core::nbd::{Stream, StreamError};
use blkloom_io::BufferPool;
use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::nid::Nid;
use openssl::ssl::{ErrorCode, Ssl, SslStream};
use openssl::x509::{X509NameRef, X509VerifyResult};
use rustix::io::Errno;

use crate::credentials::reasons;
use crate::ffi;
use crate::wire::{RECEIVED, Wire};

/// Most bytes of data in one record.
const RECORD: usize = 16 << 10;
/// Room for a record of that size with its header, padding and authentication.
const SEALED: usize = RECORD + 512;

/// What a handshake waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    Done,
    /// The socket is to become readable.
    Read,
    /// The socket is to become writable.
    Write,
}

/// Who the client has proved to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The subject of a verified certificate: the distinguished name as in RFC 4514, and its common name, if there is
    /// exactly one.
    Certificate { subject: String, common_name: Option<String> },
    /// The user of a pre-shared key.
    User(String),
}

/// Index of the user of a pre-shared key in a session.
pub(crate) fn user_index() -> Result<Index<Ssl, Option<Vec<u8>>>, ErrorStack> {
    static INDEX: OnceLock<Index<Ssl, Option<Vec<u8>>>> = OnceLock::new();
    match INDEX.get() {
        Some(index) => Ok(*index),
        None => {
            let index = Ssl::new_ex_index()?;
            Ok(*INDEX.get_or_init(|| index))
        }
    }
}

pub struct Session {
    stream: SslStream<Wire>,
    established: bool,
    /// `receive` has filled the memory of its caller: more may have arrived.
    more: bool,
    /// The peer has closed its side.
    ended: bool,
    failed: Option<StreamError>,
    /// The closing message is on its way.
    closed: bool,
}

impl Session {
    pub(crate) fn new(mut ssl: Ssl, socket: OwnedFd) -> Result<Session, ErrorStack> {
        ssl.set_accept_state();
        Session::of(ssl, socket)
    }

    /// A session of a client.
    pub(crate) fn connecting(mut ssl: Ssl, socket: OwnedFd) -> Result<Session, ErrorStack> {
        ssl.set_connect_state();
        Session::of(ssl, socket)
    }

    fn of(ssl: Ssl, socket: OwnedFd) -> Result<Session, ErrorStack> {
        let stream = SslStream::new(ssl, Wire::new(socket))?;
        Ok(Session { stream, established: false, more: false, ended: false, failed: None, closed: false })
    }

    /// Continues the handshake, and sends what it has to send.
    pub fn handshake(&mut self) -> Result<Handshake, StreamError> {
        if self.established {
            return self.flushed();
        }
        self.check()?;
        match self.stream.do_handshake() {
            Ok(()) => {
                self.established = true;
                self.stream.get_mut().has_data();
                self.flushed()
            }
            Err(error) if error.code() == ErrorCode::WANT_READ => match self.flushed()? {
                Handshake::Done => Ok(Handshake::Read),
                unsent => Ok(unsent),
            },
            Err(error) if error.code() == ErrorCode::WANT_WRITE => self.flushed().map(|_| Handshake::Write),
            Err(error) => Err(self.fail("the TLS handshake failed", &error)),
        }
    }

    fn flushed(&mut self) -> Result<Handshake, StreamError> {
        self.flush_wire()?;
        Ok(if self.stream.get_ref().has_unsent() { Handshake::Write } else { Handshake::Done })
    }

    /// Who the client is. None: it need not prove that.
    pub fn peer(&self) -> Option<Peer> {
        let ssl = self.stream.ssl();
        if let Ok(index) = user_index()
            && let Some(Some(user)) = ssl.ex_data(index)
        {
            return Some(Peer::User(String::from_utf8_lossy(user).into_owned()));
        }
        let certificate = ssl.peer_certificate()?;
        let name = certificate.subject_name();
        Some(Peer::Certificate { subject: ffi::printed(name)?, common_name: common_name(name) })
    }

    /// Version of TLS and name of the cipher, for logs.
    pub fn agreed(&self) -> String {
        let ssl = self.stream.ssl();
        format!("{} {}", ssl.version_str(), ssl.current_cipher().map_or("no cipher", |cipher| cipher.name()))
    }

    fn check(&self) -> Result<(), StreamError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn flush_wire(&mut self) -> Result<(), StreamError> {
        let flushed = self.stream.get_mut().flush();
        flushed.map_err(|errno| self.failed.insert(StreamError::Io(errno)).clone())
    }

    /// Ends the session. OpenSSL may have written an alert, which is sent if the socket accepts it.
    fn fail(&mut self, what: &str, error: &openssl::ssl::Error) -> StreamError {
        let failed = match (error.io_error(), error.ssl_error()) {
            (Some(io), _) => match Errno::from_io_error(io) {
                Some(errno) => StreamError::Io(errno),
                None => StreamError::Broken(format!("{what}: {io}")),
            },
            // OpenSSL 3 has an error for this, 1.1.1 has none.
            (None, None) => StreamError::Broken(truncated(what)),
            (None, Some(stack)) if said(stack, "unexpected eof") => StreamError::Broken(truncated(what)),
            (None, Some(stack)) => {
                let verified = self.stream.ssl().verify_result();
                let about = if verified == X509VerifyResult::OK { "" } else { verified.error_string() };
                let colon = if about.is_empty() { "" } else { ": " };
                StreamError::Broken(format!("{what}: {}{colon}{about}", reasons(stack)))
            }
        };
        let _refused = self.stream.get_mut().flush();
        self.failed.insert(failed).clone()
    }

    /// Reads data of records that have arrived. None: there is no more.
    fn read(&mut self, into: &mut [u8]) -> Result<Option<usize>, StreamError> {
        self.check()?;
        if self.ended {
            return Ok(Some(0));
        }
        match self.stream.ssl_read(into) {
            Ok(count) => {
                self.stream.get_mut().has_data();
                Ok(Some(count))
            }
            Err(error) if matches!(error.code(), ErrorCode::WANT_READ | ErrorCode::WANT_WRITE) => Ok(None),
            Err(error) if error.code() == ErrorCode::ZERO_RETURN => {
                self.ended = true;
                Ok(Some(0))
            }
            Err(error) => Err(self.fail("TLS", &error)),
        }
    }

    /// Encrypts data as one record. False: there is no room for it.
    fn seal(&mut self, data: &[u8]) -> Result<bool, StreamError> {
        if self.stream.get_mut().room() < SEALED {
            return Ok(false);
        }
        match self.stream.ssl_write(data) {
            // A whole record, because there is room for it.
            Ok(_) => match self.stream.get_mut().send_some() {
                Ok(()) => Ok(true),
                Err(errno) => Err(self.failed.insert(StreamError::Io(errno)).clone()),
            },
            // Until a message of the peer that OpenSSL is reading has arrived.
            Err(error) if matches!(error.code(), ErrorCode::WANT_READ | ErrorCode::WANT_WRITE) => Ok(false),
            Err(error) => Err(self.fail("TLS", &error)),
        }
    }

    /// Encrypts a prefix of the parts. Parts share a record, so that the header of a reply needs none of its own.
    fn seal_all(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, StreamError> {
        // Data of the next record, from several parts.
        let mut record = Vec::new();
        let mut sealed = 0;
        for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                if record.is_empty() && rest.len() >= RECORD {
                    if !self.seal(&rest[..RECORD])? {
                        return Ok(sealed);
                    }
                    (sealed, rest) = (sealed + RECORD, &rest[RECORD..]);
                    continue;
                }
                let (first, behind) = rest.split_at(rest.len().min(RECORD - record.len()));
                record.extend_from_slice(first);
                rest = behind;
                if record.len() == RECORD {
                    if !self.seal(&record)? {
                        return Ok(sealed);
                    }
                    sealed += RECORD;
                    record.clear();
                }
            }
        }
        if !record.is_empty() && self.seal(&record)? {
            sealed += record.len();
        }
        Ok(sealed)
    }
}

impl Stream for Session {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.get_ref().socket().as_fd()
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<usize, StreamError> {
        let mut have = 0;
        self.more = false;
        self.stream.get_mut().allow_receive(true);
        while have < into.len() {
            match self.read(&mut into[have..]) {
                // What was received before is delivered first; the next call reports the end or the error.
                Ok(Some(0)) | Err(_) if have > 0 => {
                    self.more = true;
                    return Ok(have);
                }
                Ok(Some(0)) => return Ok(0),
                Ok(Some(count)) => {
                    have += count;
                    self.stream.get_mut().allow_receive(false);
                }
                Ok(None) if have > 0 => return Ok(have),
                Ok(None) => return Err(StreamError::Again),
                Err(error) => return Err(error),
            }
        }
        self.more = true;
        Ok(have)
    }

    fn send(&mut self, parts: &[IoSlice<'_>], buffers: &mut BufferPool) -> Result<usize, StreamError> {
        self.check()?;
        self.stream.get_mut().prepare(buffers);
        self.stream.get_mut().begin();
        let sealed = self.seal_all(parts)?;
        self.flush(buffers)?;
        if sealed == 0 { Err(StreamError::Again) } else { Ok(sealed) }
    }

    fn flush(&mut self, buffers: &mut BufferPool) -> Result<(), StreamError> {
        self.flush_wire()?;
        self.stream.get_mut().release(buffers);
        Ok(())
    }

    fn has_unsent(&self) -> bool {
        self.stream.get_ref().has_unsent()
    }

    fn sent(&self) -> u64 {
        self.stream.get_ref().sent()
    }

    fn has_unread(&self) -> bool {
        self.more
    }

    fn is_in_record(&self) -> bool {
        ffi::has_pending(self.stream.ssl())
    }

    fn footprint(&self) -> usize {
        self.stream.get_ref().footprint() + if self.is_in_record() { RECEIVED } else { 0 }
    }

    fn close(&mut self) {
        if self.closed || !self.established || self.failed.is_some() {
            return;
        }
        self.closed = true;
        // It may find no room: the peer then sees an end without it, and knows that bytes are missing.
        let _sent = self.stream.shutdown();
        let _refused = self.stream.get_mut().flush();
    }

    fn take_descriptor(mut self: Box<Self>) -> Option<OwnedFd> {
        self.close();
        None
    }
}

fn truncated(what: &str) -> String {
    format!("{what}: the peer ended the connection without a closing message")
}

fn said(stack: &ErrorStack, text: &str) -> bool {
    stack.errors().iter().any(|error| error.reason().is_some_and(|reason| reason.contains(text)))
}

fn common_name(name: &X509NameRef) -> Option<String> {
    let mut names = name.entries_by_nid(Nid::COMMONNAME);
    let first = names.next()?;
    if names.next().is_some() { None } else { first.data().to_string().ok() }
}

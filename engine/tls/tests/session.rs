//! Sessions against a client of OpenSSL over a socket pair: bytes both ways, full sockets, ends, and floods of key
//! updates. (Python tests have the clients of other libraries.)
#![allow(clippy::unwrap_used, reason = "tests")]

use std::ffi::c_int;
use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use blkloom_core::nbd::{Stream, StreamError};
use blkloom_io::BufferPool;
use blkloom_tls::{Credentials, Handshake, Peer, Server, Session};
use openssl::ssl::{Ssl, SslContextBuilder, SslMethod, SslStream, SslVersion};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const KEY: [u8; 32] = [7; 32];
const PATIENT: Duration = Duration::from_secs(60);

unsafe extern "C" {
    fn SSL_key_update(ssl: *mut openssl_sys::SSL, kind: c_int) -> c_int;
}
const UPDATE_REQUESTED: c_int = 1;

/// A file that is removed at the end.
struct Keys(PathBuf);

impl Keys {
    fn new() -> Keys {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("blkloom-tls-{}-{number}.psk", std::process::id()));
        let key: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(&path, format!("alice:{key}\n")).unwrap();
        Keys(path)
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

fn server() -> Server {
    let keys = Keys::new();
    Server::new(&Credentials::PreShared { file: keys.0.clone() }).unwrap()
}

/// Runs a client on a thread of its own.
fn with_client<T: Send + 'static>(
    version: SslVersion,
    client: impl FnOnce(SslStream<UnixStream>) -> T + Send + 'static,
) -> (Session, std::thread::JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    for socket in [&ours, &theirs] {
        socket.set_read_timeout(Some(PATIENT)).unwrap();
        socket.set_write_timeout(Some(PATIENT)).unwrap();
    }
    let mut session = server().accept(ours.into()).unwrap();
    let thread = std::thread::spawn(move || {
        let mut context = SslContextBuilder::new(SslMethod::tls_client()).unwrap();
        context.set_min_proto_version(Some(version)).unwrap();
        context.set_max_proto_version(Some(version)).unwrap();
        context.set_cipher_list("DHE-PSK-AES128-GCM-SHA256").unwrap();
        context.set_psk_client_callback(|_, _, user, key| {
            user[..6].copy_from_slice(b"alice\0");
            key[..KEY.len()].copy_from_slice(&KEY);
            Ok(KEY.len())
        });
        let mut stream = SslStream::new(Ssl::new(&context.build()).unwrap(), theirs).unwrap();
        stream.connect().unwrap();
        client(stream)
    });
    loop {
        match session.handshake().unwrap() {
            Handshake::Done => break,
            Handshake::Read => wait(&session, PollFlags::IN),
            Handshake::Write => wait(&session, PollFlags::OUT),
        }
    }
    (session, thread)
}

fn wait(session: &Session, flags: PollFlags) {
    let fd = session.descriptor();
    let patience = Timespec { tv_sec: PATIENT.as_secs() as i64, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&fd, flags)], Some(&patience)).unwrap(), 1, "the client does nothing");
}

/// Receives until the end or an error.
fn receive_all(session: &mut Session, piece: usize) -> (Vec<u8>, Result<(), StreamError>) {
    let (mut received, mut into) = (Vec::new(), vec![0; piece]);
    loop {
        match session.receive(&mut into) {
            Ok(0) => return (received, Ok(())),
            Ok(count) => received.extend_from_slice(&into[..count]),
            Err(StreamError::Again) => {
                assert!(!session.has_unread(), "bytes that have arrived are received");
                session.flush(&mut BufferPool::new(0)).unwrap();
                wait(session, PollFlags::IN);
            }
            Err(error) => return (received, Err(error)),
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 5) as u8 ^ (at >> 11) as u8).collect()
}

#[test]
fn bytes_arrive_in_order_in_pieces_of_any_size() {
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        for piece in [1 << 10, 100_003, 1 << 20] {
            let (mut session, client) = with_client(version, |mut stream| {
                stream.write_all(&pattern(3_000_001)).unwrap();
                stream.shutdown().unwrap();
            });
            let (received, ended) = receive_all(&mut session, piece);
            ended.unwrap();
            assert!(received == pattern(3_000_001));
            client.join().unwrap();
            assert_eq!(session.peer(), Some(Peer::User("alice".to_owned())));
        }
    }
}

#[test]
fn parts_are_sent_in_order_and_a_full_socket_is_waited_for() {
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let (mut session, client) = with_client(version, |mut stream| {
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            received
        });
        let all = pattern(5_000_000);
        let mut buffers = BufferPool::new(1 << 20);
        let mut at = 0;
        while at < all.len() {
            // A head, a body, a head, ...: as replies are.
            let ends = [16, 16 + 65_536, 32 + 65_536, 40_000 + 65_536].map(|end| (at + end).min(all.len()));
            let parts = [&all[at..ends[0]], &all[ends[0]..ends[1]], &all[ends[1]..ends[2]], &all[ends[2]..ends[3]]];
            match session.send(&parts.map(IoSlice::new), &mut buffers) {
                Ok(count) => at += count,
                Err(StreamError::Again) => wait(&session, PollFlags::OUT),
                Err(error) => panic!("{error}"),
            }
        }
        while session.has_unsent() {
            wait(&session, PollFlags::OUT);
            session.flush(&mut buffers).unwrap();
        }
        assert_eq!(session.footprint(), 0, "an idle session has no buffers");
        assert!(session.sent() > all.len() as u64);
        session.close();
        assert!(client.join().unwrap() == all);
    }
}

#[test]
fn an_end_without_a_closing_message_is_an_error_after_the_data_before_it() {
    let (mut session, client) = with_client(SslVersion::TLS1_3, |mut stream| {
        stream.write_all(b"whole").unwrap();
        let mut raw = stream.get_ref();
        raw.write_all(&[0x17, 3, 3, 0x10, 0x11, 1, 2, 3]).unwrap();
        raw.shutdown(std::net::Shutdown::Both).unwrap();
    });
    client.join().unwrap();
    let (received, ended) = receive_all(&mut session, 100);
    assert_eq!(received, b"whole");
    let said = ended.unwrap_err().to_string();
    assert!(said.contains("without a closing message"), "{said}");
    assert!(session.receive(&mut [0; 10]).is_err(), "an error is final");
}

#[test]
fn keys_may_be_updated_between_data() {
    let (mut session, client) = with_client(SslVersion::TLS1_3, |mut stream| {
        for byte in 0..200 {
            // SAFETY: the session is valid, and this thread's only.
            assert_eq!(unsafe { SSL_key_update(raw(&stream), UPDATE_REQUESTED) }, 1);
            stream.write_all(&[byte; 1000]).unwrap();
        }
        stream.shutdown().unwrap();
    });
    let (received, ended) = receive_all(&mut session, 1 << 16);
    ended.unwrap();
    assert_eq!(received.len(), 200_000);
    client.join().unwrap();
}

#[test]
fn a_client_that_only_updates_its_keys_is_given_up() {
    let (mut session, client) = with_client(SslVersion::TLS1_3, |mut stream| {
        stream.get_ref().set_nonblocking(false).unwrap();
        // Its answers are never read, so that what the server has to write is bounded, too.
        loop {
            // SAFETY: as above.
            assert_eq!(unsafe { SSL_key_update(raw(&stream), UPDATE_REQUESTED) }, 1);
            if stream.do_handshake().is_err() {
                return;
            }
        }
    });
    let mut most = 0;
    let ended = loop {
        match session.receive(&mut [0; 100]) {
            Ok(count) => panic!("{count} bytes of nothing"),
            Err(StreamError::Again) => {
                most = most.max(session.footprint());
                session.flush(&mut BufferPool::new(0)).unwrap();
                wait(&session, PollFlags::IN);
            }
            Err(error) => break error.to_string(),
        }
    };
    assert!(ended.contains("records without data"), "{ended}");
    assert!(most < 300_000, "{most} bytes");
    drop(session);
    client.join().unwrap();
}

fn raw(stream: &SslStream<UnixStream>) -> *mut openssl_sys::SSL {
    use foreign_types::ForeignTypeRef;
    stream.ssl().as_ptr()
}

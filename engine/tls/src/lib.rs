//! TLS for NBD connections, by the system's OpenSSL: version 1.2 and 1.3, with certificates or pre-shared keys.
//!
//! `Server` has the credentials of one server, `Client` those of a client of one. A `Session` is one connection: after its handshake it is a `Stream`
//! that an event loop serves. `Wire` is the socket below OpenSSL: it receives many records by one system call, and
//! collects many records for one send.
//!
//! A session is never resumed or renegotiated, and never moves to another process. Nothing here waits.

mod client;
mod credentials;
mod ffi;
mod pre_shared;
mod server;
mod session;
mod wire;

pub use client::{Client, ClientCredentials};
pub use credentials::{Credentials, CredentialsError};
pub use server::Server;
pub use session::{Handshake, Peer, Session};

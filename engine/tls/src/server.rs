//! `Server`: the settings and credentials that all sessions of a server share.

use std::os::fd::OwnedFd;

use openssl::error::ErrorStack;
use openssl::ssl::{
    Ssl, SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions, SslSessionCacheMode, SslVersion,
};

use crate::credentials::{Credentials, CredentialsError};
use crate::ffi;
use crate::session::Session;
use crate::wire::RECEIVED;

/// 2: keys and hashes with at least 112 bits of security.
const SECURITY_LEVEL: u32 = 2;
/// AES with 128 bits first: it is the fastest, and secure.
const SUITES: &str = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";

pub struct Server {
    context: SslContext,
}

impl Server {
    /// Reads the credentials. They do not change any more: make another server to read them again.
    pub fn new(credentials: &Credentials) -> Result<Server, CredentialsError> {
        let mut context = SslContextBuilder::new(SslMethod::tls_server())?;
        configure(&mut context)?;
        context.set_options(SslOptions::CIPHER_SERVER_PREFERENCE | SslOptions::PRIORITIZE_CHACHA);
        context.set_num_tickets(0)?;
        ffi::set_automatic_dh(&mut context);
        credentials.load(&mut context)?;
        Ok(Server { context: context.build() })
    }

    /// Begins a session on a connected socket. Its handshake comes first.
    pub fn accept(&self, socket: OwnedFd) -> Result<Session, CredentialsError> {
        Ok(Session::new(Ssl::new(&self.context)?, socket)?)
    }
}

/// The settings that sessions of servers and of clients share.
pub(crate) fn configure(context: &mut SslContextBuilder) -> Result<(), ErrorStack> {
    context.set_security_level(SECURITY_LEVEL);
    context.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    context.set_ciphersuites(SUITES)?;
    context.set_options(SslOptions::NO_RENEGOTIATION | SslOptions::NO_TICKET | SslOptions::NO_COMPRESSION);
    context.set_session_cache_mode(SslSessionCacheMode::OFF);
    context.set_mode(SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER | SslMode::RELEASE_BUFFERS);
    context.set_read_ahead(true);
    ffi::set_read_buffer(context, RECEIVED);
    Ok(())
}

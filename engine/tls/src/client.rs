//! `Client`: the settings and credentials of sessions with one server.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use openssl::ssl::{Ssl, SslContext, SslContextBuilder, SslMethod, SslRef, SslVerifyMode};

use crate::credentials::{self, CredentialsError};
use crate::server;
use crate::session::Session;

/// What a client proves who it is with, and which servers it believes.
#[derive(Clone, Debug)]
pub enum ClientCredentials {
    /// directory: `ca-cert.pem`, `ca-crl.pem` if there is one, and `client-cert.pem` with `client-key.pem` if there are
    /// any. None: the authorities of the system. verify: the server's certificate must be valid for its host.
    Certificates { directory: Option<PathBuf>, verify: bool },
    /// A file of users and keys (`pre_shared`), and the user.
    PreShared { file: PathBuf, user: String },
}

pub struct Client {
    context: SslContext,
    verify: bool,
}

impl Client {
    /// Reads the credentials.
    pub fn new(wanted: &ClientCredentials) -> Result<Client, CredentialsError> {
        let mut context = SslContextBuilder::new(SslMethod::tls_client())?;
        server::configure(&mut context)?;
        let verify = match wanted {
            ClientCredentials::Certificates { directory, verify } => {
                context.set_cipher_list(credentials::CERTIFICATE_CIPHERS)?;
                match directory {
                    Some(directory) => {
                        if *verify {
                            credentials::load_authority(&mut context, directory)?;
                        }
                        if directory.join(credentials::CLIENT.0).exists() {
                            credentials::load_certificate(&mut context, directory, credentials::CLIENT)?;
                        }
                    }
                    None => context.set_default_verify_paths()?,
                }
                context.set_verify(if *verify { SslVerifyMode::PEER } else { SslVerifyMode::NONE });
                *verify
            }
            ClientCredentials::PreShared { file, user } => {
                context.set_cipher_list(credentials::KEY_CIPHERS)?;
                let key = credentials::key_of(file, user)?;
                let mut name = user.clone().into_bytes();
                name.push(0);
                context.set_psk_client_callback(
                    move |_: &mut SslRef, _hint: Option<&[u8]>, into_name: &mut [u8], into: &mut [u8]| {
                        if name.len() > into_name.len() || key.len() > into.len() {
                            return Ok(0);
                        }
                        into_name[..name.len()].copy_from_slice(&name);
                        into[..key.len()].copy_from_slice(&key);
                        Ok(key.len())
                    },
                );
                // A server with a certificate does not know the key.
                context.set_verify(SslVerifyMode::PEER);
                false
            }
        };
        Ok(Client { context: context.build(), verify })
    }

    /// Begins a session on a connected socket. Its handshake comes first. host: a name or an address that the server's
    /// certificate must have.
    pub fn connect(&self, socket: OwnedFd, host: &str) -> Result<Session, CredentialsError> {
        let mut ssl = Ssl::new(&self.context)?;
        let address: Option<IpAddr> = host.parse().ok();
        if self.verify {
            match address {
                Some(address) => ssl.param_mut().set_ip(address)?,
                None => ssl.param_mut().set_host(host)?,
            }
        }
        if address.is_none() && !host.is_empty() {
            ssl.set_hostname(host)?;
        }
        Ok(Session::connecting(ssl, socket)?)
    }
}

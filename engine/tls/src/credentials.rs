//! Files of credentials, read into a context of OpenSSL. Errors name the file; keys are in no message.

use std::path::{Path, PathBuf};

use openssl::error::ErrorStack;
use openssl::pkey::PKey;
use openssl::ssl::{SslContextBuilder, SslFiletype, SslRef, SslVerifyMode};
use openssl::stack::Stack;
use openssl::x509::X509;
use openssl::x509::store::{X509Lookup, X509StoreBuilder};
use openssl::x509::verify::X509VerifyFlags;

use crate::pre_shared;
use crate::session::user_index;

const AUTHORITY: &str = "ca-cert.pem";
const REVOKED: &str = "ca-crl.pem";
/// Names of the files of a certificate and its key.
pub(crate) type Names = (&'static str, &'static str);
const SERVER: Names = ("server-cert.pem", "server-key.pem");
pub(crate) const CLIENT: Names = ("client-cert.pem", "client-key.pem");

/// TLS 1.2 with certificates: authenticated encryption with forward secrecy only.
pub(crate) const CERTIFICATE_CIPHERS: &str = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:!aPSK";
/// The same with pre-shared keys.
pub(crate) const KEY_CIPHERS: &str = "DHE-PSK-AES128-GCM-SHA256:DHE-PSK-AES256-GCM-SHA384:\
    ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-CHACHA20-POLY1305";

/// What a server and its clients prove who they are with.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, and `ca-crl.pem` if there is one. verify_peer: clients must
    /// have a certificate, too.
    Certificates { directory: PathBuf, verify_peer: bool },
    /// A file of users and keys (`pre_shared`).
    PreShared { file: PathBuf },
}

/// A file of credentials that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("{path}: {error}")]
    Unreadable { path: String, error: std::io::Error },
    #[error("{path}: {why}")]
    Unusable { path: String, why: String },
    #[error("OpenSSL: {0}")]
    OpenSsl(#[from] ErrorStack),
}

impl Credentials {
    /// Reads the files, and puts the credentials into a context.
    pub(crate) fn load(&self, context: &mut SslContextBuilder) -> Result<(), CredentialsError> {
        match self {
            Credentials::Certificates { directory, verify_peer } => {
                context.set_cipher_list(CERTIFICATE_CIPHERS)?;
                load_certificate(context, directory, SERVER)?;
                if *verify_peer {
                    load_authority(context, directory)?;
                    context.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
                }
                Ok(())
            }
            Credentials::PreShared { file } => {
                context.set_cipher_list(KEY_CIPHERS)?;
                load_keys(context, file)
            }
        }
    }
}

pub(crate) fn load_certificate(
    context: &mut SslContextBuilder,
    directory: &Path,
    (certificate, key): Names,
) -> Result<(), CredentialsError> {
    let path = directory.join(certificate);
    let mut chain = certificates(&path)?.into_iter();
    let Some(own) = chain.next() else {
        return Err(unusable(&path, "it has no certificate"));
    };
    context.set_certificate(&own).map_err(|error| unusable(&path, &reasons(&error)))?;
    for issuer in chain {
        context.add_extra_chain_cert(issuer)?;
    }
    let path = directory.join(key);
    // A key that is encrypted is refused: OpenSSL would ask for its password at the terminal.
    let key = PKey::private_key_from_pem_callback(&contents(&path)?, |_| Ok(0))
        .map_err(|error| unusable(&path, &format!("no private key without a password: {}", reasons(&error))))?;
    context
        .set_private_key(&key)
        .and_then(|()| context.check_private_key())
        .map_err(|_| unusable(&path, &format!("this is not the key of {certificate}")))
}

/// Trusts the certificates of the authority only, not those of the system.
pub(crate) fn load_authority(context: &mut SslContextBuilder, directory: &Path) -> Result<(), CredentialsError> {
    let path = directory.join(AUTHORITY);
    let (mut store, mut names) = (X509StoreBuilder::new()?, Stack::new()?);
    for certificate in certificates(&path)? {
        names.push(certificate.subject_name().to_owned()?)?;
        store.add_cert(certificate)?;
    }
    if names.is_empty() {
        return Err(unusable(&path, "it has no certificate"));
    }
    let path = directory.join(REVOKED);
    // Also a link that leads nowhere: without its file, revoked certificates would be valid.
    if path.symlink_metadata().is_ok() {
        contents(&path)?;
        let lookup = store.add_lookup(X509Lookup::file())?;
        lookup.load_crl_file(&path, SslFiletype::PEM).map_err(|error| unusable(&path, &reasons(&error)))?;
        store.set_flags(X509VerifyFlags::CRL_CHECK)?;
    }
    context.set_cert_store(store.build());
    context.set_client_ca_list(names);
    Ok(())
}

/// The key of a user.
pub(crate) fn key_of(path: &Path, user: &str) -> Result<Vec<u8>, CredentialsError> {
    let mut keys = pre_shared::parse(&contents(path)?).map_err(|why| unusable(path, &why))?;
    keys.remove(user.as_bytes()).ok_or_else(|| unusable(path, &format!("it has no key of the user {user:?}")))
}

fn load_keys(context: &mut SslContextBuilder, path: &Path) -> Result<(), CredentialsError> {
    let keys = pre_shared::parse(&contents(path)?).map_err(|why| unusable(path, &why))?;
    let index = user_index()?;
    // For TLS 1.3, too: OpenSSL then takes the key for one of SHA-256, as clients of GnuTLS do.
    context.set_psk_server_callback(move |ssl: &mut SslRef, user: Option<&[u8]>, into: &mut [u8]| {
        let found = user.and_then(|user| keys.get_key_value(user)).filter(|(_, key)| key.len() <= into.len());
        ssl.set_ex_data(index, found.map(|(user, _)| user.clone()));
        let Some((_, key)) = found else {
            return Ok(0);
        };
        into[..key.len()].copy_from_slice(key);
        Ok(key.len())
    });
    Ok(())
}

fn certificates(path: &Path) -> Result<Vec<X509>, CredentialsError> {
    X509::stack_from_pem(&contents(path)?).map_err(|error| unusable(path, &reasons(&error)))
}

fn contents(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    std::fs::read(path)
        .map_err(|error| CredentialsError::Unreadable { path: path.to_string_lossy().into_owned(), error })
}

fn unusable(path: &Path, why: &str) -> CredentialsError {
    CredentialsError::Unusable { path: path.to_string_lossy().into_owned(), why: why.to_owned() }
}

/// What OpenSSL says, without its source files.
pub(crate) fn reasons(stack: &ErrorStack) -> String {
    let reasons: Vec<&str> = stack.errors().iter().filter_map(openssl::error::Error::reason).collect();
    if reasons.is_empty() { "unknown error".to_owned() } else { reasons.join(", ") }
}

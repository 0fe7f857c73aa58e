//! Functions of OpenSSL (1.1.1 and newer) for which the crates `openssl` and `openssl-sys` have no declaration.

use std::ffi::{c_char, c_int, c_long, c_ulong};

use foreign_types::ForeignTypeRef;
use openssl::ssl::{SslContextBuilder, SslRef};
use openssl::x509::X509NameRef;

unsafe extern "C" {
    fn SSL_CTX_set_default_read_buffer_len(context: *mut openssl_sys::SSL_CTX, len: usize);
    fn SSL_has_pending(ssl: *const openssl_sys::SSL) -> c_int;
    fn X509_NAME_print_ex(
        out: *mut openssl_sys::BIO,
        name: *const openssl_sys::X509_NAME,
        indent: c_int,
        flags: c_ulong,
    ) -> c_int;
}

/// Sets the number of bytes that a session receives at once.
pub fn set_read_buffer(context: &mut SslContextBuilder, len: usize) {
    // SAFETY: the context is valid, and the function only stores a number in it.
    unsafe { SSL_CTX_set_default_read_buffer_len(context.as_ptr(), len) }
}

/// Sets the parameters of ephemeral Diffie-Hellman by the length of the other keys.
pub fn set_automatic_dh(context: &mut SslContextBuilder) {
    // SAFETY: the context is valid, and the function only stores a number in it.
    unsafe { openssl_sys::SSL_CTX_set_dh_auto(context.as_ptr(), 1) };
}

/// Whether a session has received bytes that were not read yet, also those of an incomplete record.
pub fn has_pending(ssl: &SslRef) -> bool {
    // SAFETY: the session is valid, and the function only reads it.
    unsafe { SSL_has_pending(ssl.as_ptr()) == 1 }
}

/// XN_FLAG_RFC2253 without the escapes for characters outside of ASCII: names are UTF-8.
const NAME_FORMAT: c_ulong = 0x0111_0313;

/// A distinguished name in the notation of RFC 4514: `CN=disk,O=Example`. None: OpenSSL cannot print it.
pub fn printed(name: &X509NameRef) -> Option<String> {
    // SAFETY: the memory BIO is checked, used and freed here only. The name is valid. The data of the BIO is copied
    // before it is freed.
    unsafe {
        let out = openssl_sys::BIO_new(openssl_sys::BIO_s_mem());
        if out.is_null() {
            return None;
        }
        let mut data: *mut c_char = std::ptr::null_mut();
        let printed = X509_NAME_print_ex(out, name.as_ptr(), 0, NAME_FORMAT) >= 0;
        let len: c_long = openssl_sys::BIO_get_mem_data(out, &mut data);
        let text = match (printed, usize::try_from(len)) {
            (true, Ok(len)) if len > 0 => {
                String::from_utf8(std::slice::from_raw_parts(data.cast::<u8>(), len).to_vec()).ok()
            }
            _ => None,
        };
        openssl_sys::BIO_free_all(out);
        text
    }
}

//! The log in which a device marks pages of the driver's memory that it has written, for a live migration (vhost-user's
//! SET_LOG_BASE): one bit for each page, from address 0 on.

/// VHOST_LOG_PAGE.
pub const PAGE: u64 = 4096;
const PAGES_OF_A_BYTE: u64 = 8;

/// Number of bytes of a log that has all addresses below `end`.
pub const fn length(end: u64) -> u64 {
    end.div_ceil(PAGE * PAGES_OF_A_BYTE)
}

/// Bits to set for `bytes` bytes from `address` on, in a log of `log` bytes: (offset in the log, bits). Pages that the
/// log does not have are left out.
pub fn marks(address: u64, bytes: u64, log: u64) -> impl Iterator<Item = (u64, u8)> {
    let last = address.saturating_add(bytes.saturating_sub(1)) / PAGE;
    let first = address / PAGE;
    let (from, to) = (first / PAGES_OF_A_BYTE, last / PAGES_OF_A_BYTE + 1);
    let range = if bytes == 0 { 0..0 } else { from..to.min(log) };
    range.map(move |at| {
        let low = if at == from { first % PAGES_OF_A_BYTE } else { 0 };
        let high = if at + 1 == to { last % PAGES_OF_A_BYTE } else { PAGES_OF_A_BYTE - 1 };
        (at, (u8::MAX << low) & (u8::MAX >> (PAGES_OF_A_BYTE - 1 - high)))
    })
}

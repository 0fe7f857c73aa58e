//! INIT: negotiation of protocol version, capabilities and limits between kernel and server.

use crate::capability::{
    ABORT_ERROR, ASYNC_DIO, ASYNC_READ, BIG_WRITES, DIRECT_IO_ALLOW_MMAP, HAS_RESEND, INIT_EXT, MAX_PAGES,
    OVER_IO_URING,
};
use crate::request::{Fields, INIT_BUFFER_SIZE, Reason, WRITE_DATA_OFFSET};

const MAJOR: u32 = 7;
/// The first protocol with all required features (MAX_PAGES, 7.28; Linux 4.20).
const OLDEST_MINOR: u32 = 28;
/// The newest protocol whose features are used (HAS_RESEND, 7.40).
const NEWEST_MINOR: u32 = 40;
/// The protocol that has OVER_IO_URING (Linux 6.14).
const RING_MINOR: u32 = 42;
/// Capabilities that the server requests if the kernel has them.
const WANTED: u64 =
    ASYNC_READ | BIG_WRITES | ASYNC_DIO | ABORT_ERROR | MAX_PAGES | INIT_EXT | DIRECT_IO_ALLOW_MMAP | HAS_RESEND;
/// Capability that is requested if requests come over a ring, because the kernel does not send those again.
const WANTED_OVER_RING: u64 = WANTED & !HAS_RESEND | OVER_IO_URING;
/// Maximum pages of a request without MAX_PAGES (FUSE_DEFAULT_MAX_PAGES_PER_REQ).
const DEFAULT_MAX_PAGES: u32 = 32;
const SMALLEST_TRANSFER: u32 = 4096;

/// The kernel's INIT request. capabilities: bits of `capability`, and bits that this crate does not name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Init {
    pub major: u32,
    pub minor: u32,
    /// Bytes that the page cache may read ahead.
    pub max_readahead: u32,
    pub capabilities: u64,
}

/// The server's limits. blkloom uses `Settings::default()`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Maximum number of background requests (asynchronous direct I/O, read-ahead) in flight. For the mount of an
    /// ordinary user the kernel also applies its parameter `max_user_bgreq`.
    pub max_background: u16,
    /// Maximum bytes of a read or write. A power of two from 4096 on is best; the kernel limits it to
    /// `fs.fuse.max_pages_limit` pages.
    pub max_transfer: u32,
    /// Page size of the machine in bytes.
    pub page_size: u32,
    /// Whether requests shall come over io_uring, if the kernel supports it: see `ring`. Such a connection has no
    /// RESEND.
    pub over_ring: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { max_background: 256, max_transfer: 1 << 20, page_size: 4096, over_ring: false }
    }
}

/// The answer to an INIT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InitAnswer {
    /// Reply with `reply::initialized`. The connection works from then on.
    Settled(Negotiated),
    /// Reply with `reply::other_version`: the kernel also supports a later protocol, and sends an INIT of version 7
    /// next.
    OtherVersion,
}

/// The kernel is too old. Reply with EPROTO; nothing can be served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the kernel speaks FUSE {major}.{minor}; 7.28 (Linux 4.20) or later is needed")]
pub struct Incompatible {
    pub major: u32,
    pub minor: u32,
}

/// The negotiated parameters of a connection. `to_bytes` gives the fuse_init_out that was sent to the kernel; the next
/// server of the connection needs these bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Negotiated {
    pub minor: u32,
    /// Bytes that the page cache may read ahead.
    pub max_readahead: u32,
    /// Bits of `capability`.
    pub capabilities: u64,
    pub max_background: u16,
    /// Number of background requests from which on the kernel regards the file as congested, and reads ahead less.
    pub congestion_threshold: u16,
    /// Maximum bytes of a write.
    pub max_write: u32,
    /// Maximum pages of a request.
    pub max_pages: u16,
}

/// The reason why bytes are not a valid `Negotiated`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no settings of a FUSE connection: {what}")]
pub struct NotNegotiated {
    pub what: &'static str,
}

impl Init {
    pub(crate) fn parse(fields: &mut Fields<'_>) -> Result<Init, Reason> {
        fields.need(16)?;
        let (major, minor, max_readahead) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let mut capabilities = u64::from(fields.u32()?);
        if capabilities & INIT_EXT != 0 {
            capabilities |= u64::from(fields.u32()?) << 32;
        }
        Ok(Init { major, minor, max_readahead, capabilities })
    }

    /// Chooses the parameters of the connection.
    pub fn negotiate(&self, settings: &Settings) -> Result<InitAnswer, Incompatible> {
        if self.major > MAJOR {
            return Ok(InitAnswer::OtherVersion);
        }
        if self.major < MAJOR || self.minor < OLDEST_MINOR {
            return Err(Incompatible { major: self.major, minor: self.minor });
        }
        let over_ring = settings.over_ring && self.capabilities & OVER_IO_URING != 0;
        let (wanted, newest) = if over_ring { (WANTED_OVER_RING, RING_MINOR) } else { (WANTED, NEWEST_MINOR) };
        let capabilities = self.capabilities & wanted;
        let page_size = settings.page_size.max(1);
        let most_pages = if capabilities & MAX_PAGES != 0 { u32::from(u16::MAX) } else { DEFAULT_MAX_PAGES };
        let max_pages = settings.max_transfer.div_ceil(page_size).clamp(1, most_pages);
        let max_write = settings.max_transfer.min(max_pages.saturating_mul(page_size)).max(SMALLEST_TRANSFER);
        let max_background = settings.max_background.max(1);
        Ok(InitAnswer::Settled(Negotiated {
            minor: self.minor.min(newest),
            max_readahead: self.max_readahead,
            capabilities,
            max_background,
            // The kernel's own ratio (FUSE_DEFAULT_CONGESTION_THRESHOLD).
            congestion_threshold: (u32::from(max_background) * 3).div_ceil(4) as u16,
            max_write,
            max_pages: max_pages as u16,
        }))
    }
}

impl Negotiated {
    /// Size of the result of `to_bytes` in bytes.
    pub const SIZE: usize = 64;

    pub const fn has(&self, capability: u64) -> bool {
        self.capabilities & capability == capability
    }

    /// Size in bytes of a buffer for any message. The kernel does not accept a smaller one.
    pub const fn read_buffer_size(&self) -> usize {
        let write = WRITE_DATA_OFFSET + self.max_write as usize;
        if write < INIT_BUFFER_SIZE { INIT_BUFFER_SIZE } else { write }
    }

    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0..4].copy_from_slice(&MAJOR.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.minor.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.max_readahead.to_ne_bytes());
        bytes[12..16].copy_from_slice(&(self.capabilities as u32).to_ne_bytes());
        bytes[16..18].copy_from_slice(&self.max_background.to_ne_bytes());
        bytes[18..20].copy_from_slice(&self.congestion_threshold.to_ne_bytes());
        bytes[20..24].copy_from_slice(&self.max_write.to_ne_bytes());
        bytes[24..28].copy_from_slice(&1u32.to_ne_bytes()); // time_gran: a nanosecond
        bytes[28..30].copy_from_slice(&self.max_pages.to_ne_bytes());
        bytes[32..36].copy_from_slice(&((self.capabilities >> 32) as u32).to_ne_bytes());
        bytes
    }

    /// The inverse of `to_bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Negotiated, NotNegotiated> {
        let wrong = |what| NotNegotiated { what };
        if bytes.len() != Self::SIZE {
            return Err(wrong("they are 64 bytes"));
        }
        let (major, negotiated) = Self::take(&mut Fields { rest: bytes }).map_err(|_| wrong("they are cut short"))?;
        let (wanted, newest) = match negotiated.has(OVER_IO_URING) {
            true => (WANTED_OVER_RING, RING_MINOR),
            false => (WANTED, NEWEST_MINOR),
        };
        if major != MAJOR || !(OLDEST_MINOR..=newest).contains(&negotiated.minor) {
            return Err(wrong("another version of the protocol"));
        }
        if negotiated.capabilities & !wanted != 0 {
            return Err(wrong("capabilities that this version does not ask for"));
        }
        if negotiated.max_write < SMALLEST_TRANSFER || negotiated.max_pages == 0 {
            return Err(wrong("writes are smaller than 4096 bytes"));
        }
        if negotiated.to_bytes() != bytes {
            return Err(wrong("unknown fields"));
        }
        Ok(negotiated)
    }

    fn take(fields: &mut Fields<'_>) -> Result<(u32, Negotiated), Reason> {
        let (major, minor, max_readahead, low) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
        let (max_background, congestion_threshold) = (fields.u16()?, fields.u16()?);
        let (max_write, _time_granularity) = (fields.u32()?, fields.u32()?);
        let (max_pages, _map_alignment, high) = (fields.u16()?, fields.u16()?, fields.u32()?);
        let capabilities = u64::from(low) | u64::from(high) << 32;
        let negotiated = Negotiated {
            minor,
            max_readahead,
            capabilities,
            max_background,
            congestion_threshold,
            max_write,
            max_pages,
        };
        Ok((major, negotiated))
    }
}

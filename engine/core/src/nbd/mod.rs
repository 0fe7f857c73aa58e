//! NBD's transmission phase: `connection` takes requests in and serves them, `output` sends replies.

mod connection;
mod output;

pub use connection::{Connection, Selected, Session, Skipping, Ticket, Unfinished, Workbench};
pub use output::Arena;

//! Commands to /dev/ublk-control. What their buffers contain (information about a device, its parameters) is negotiated
//! in Python.

use crate::{READ, READ_WRITE, encoded};

/// Size of a command in bytes.
pub const COMMAND_SIZE: usize = 32;

/// Number of no queue.
const NO_QUEUE: u16 = u16::MAX;

/// A command to the driver. The commands of one device wait for each other; some wait for I/O of the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    GetInfo,
    Add,
    Delete,
    Start,
    Stop,
    SetParameters,
    GetParameters,
    StartRecovery,
    EndRecovery,
    GetFeatures,
    UpdateSize,
    Quiesce,
}

impl Command {
    pub const ALL: [Command; 12] = [
        Command::GetInfo,
        Command::Add,
        Command::Delete,
        Command::Start,
        Command::Stop,
        Command::SetParameters,
        Command::GetParameters,
        Command::StartRecovery,
        Command::EndRecovery,
        Command::GetFeatures,
        Command::UpdateSize,
        Command::Quiesce,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Command::GetInfo => "get-info",
            Command::Add => "add",
            Command::Delete => "delete",
            Command::Start => "start",
            Command::Stop => "stop",
            Command::SetParameters => "set-parameters",
            Command::GetParameters => "get-parameters",
            Command::StartRecovery => "start-recovery",
            Command::EndRecovery => "end-recovery",
            Command::GetFeatures => "get-features",
            Command::UpdateSize => "update-size",
            Command::Quiesce => "quiesce",
        }
    }

    /// The command of a name.
    pub fn named(name: &str) -> Option<Command> {
        Command::ALL.into_iter().find(|command| command.name() == name)
    }

    pub const fn opcode(self) -> u32 {
        let (direction, number) = match self {
            Command::GetInfo => (READ, 0x02),
            Command::Add => (READ_WRITE, 0x04),
            Command::Delete => (READ_WRITE, 0x05),
            Command::Start => (READ_WRITE, 0x06),
            Command::Stop => (READ_WRITE, 0x07),
            Command::SetParameters => (READ_WRITE, 0x08),
            Command::GetParameters => (READ, 0x09),
            Command::StartRecovery => (READ_WRITE, 0x10),
            Command::EndRecovery => (READ_WRITE, 0x11),
            Command::GetFeatures => (READ, 0x13),
            Command::UpdateSize => (READ_WRITE, 0x15),
            Command::Quiesce => (READ_WRITE, 0x16),
        };
        encoded(direction, number, COMMAND_SIZE)
    }
}

/// Builds the bytes of a command. device: the N of /dev/ublkcN; u32::MAX lets the driver choose a number for a new
/// device. buffer: address and length of memory that the driver reads or writes. data: the command's argument.
pub fn command(device: u32, buffer: (u64, u16), data: u64) -> [u8; COMMAND_SIZE] {
    let mut bytes = [0; COMMAND_SIZE];
    bytes[0..4].copy_from_slice(&device.to_ne_bytes());
    bytes[4..6].copy_from_slice(&NO_QUEUE.to_ne_bytes());
    bytes[6..8].copy_from_slice(&buffer.1.to_ne_bytes());
    bytes[8..16].copy_from_slice(&buffer.0.to_ne_bytes());
    bytes[16..24].copy_from_slice(&data.to_ne_bytes());
    bytes
}

//! An event loop whose io_uring fails continues with threads, and the log says so. A separate test program, because it
//! breaks every ring of the process.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::time::Duration;

use blkloom_core::{Engine, IoChoice, Memory, Op, log};
use rig::*;

#[test]
fn threads_execute_the_requests_of_a_loop_whose_ring_fails() {
    const SIZE: u64 = 1 << 20;
    log::collect();
    let engine = match Engine::new(1, IoChoice::Ring, Duration::ZERO, 2) {
        Ok(engine) => engine,
        Err(error) => return eprintln!("SKIPPED: {error}"),
    };
    let disk = file(SIZE, false); // with direct I/O threads would do what is unaligned
    let device = device(mapping(vec![(SIZE, data(&disk, 0))], vec![]));
    let transfer = |op, byte: u8, fua| {
        let mut bytes = vec![byte; SIZE as usize];
        let memory = Memory::Borrowed(promised(&mut bytes));
        assert_eq!(by_queue(&engine, &device, op, 0, memory, SIZE, fua), Ok(()), "{op:?}");
        bytes
    };
    transfer(Op::Write, 1, false);
    assert!(lose_all_rings() > 0, "the loop has a ring");
    for round in 2..5 {
        transfer(Op::Write, round, round == 3);
        assert!(transfer(Op::Read, 0, false) == vec![round; SIZE as usize]);
    }
    assert_eq!(device.stats().totals().in_flight, 0);
    let said: Vec<String> = log::take().records.into_iter().map(|record| record.text).collect();
    let [said] = said.as_slice() else { panic!("it is said once: {said:?}") };
    assert!(said.starts_with("io_uring_enter failed; this loop goes on with threads (error="), "{said}");
}

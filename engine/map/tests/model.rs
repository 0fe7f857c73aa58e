//! Maps and cluster tables, compared with slow and simple models.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use blkloom_map::{ClusterTable, Entry, Extent, Filtered, Handles, Hint, Map, MapError, Resolved, Segment};
use proptest::prelude::*;

/// The number of cases; an eighth under Miri, which is a hundred times slower.
const fn many(count: usize) -> usize {
    if cfg!(miri) { count.div_ceil(8) } else { count }
}

#[derive(Debug)]
struct Numbers;

impl Handles for Numbers {
    type File = u32;
    type Region = u32;
    type Device = u32;
    type Backend = u32;
    type Tee = u32;
    type Filter = ();
    type Error = i32;
    const ENTRY_ERROR: i32 = 5;
}

/// The location of one byte, in a form that can be compared.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum At {
    Data(u32, u64, bool),
    Memory(u32, u64),
    Zero,
    Error(i32),
    Fault,
    Device(u32, u64),
    Backend(u32, u64, bool),
    Tee(u32, u64),
}

fn at(resolved: &Resolved<'_, Numbers>, plus: u64) -> At {
    match resolved {
        Resolved::Data { file, offset, writable, .. } => At::Data(**file, offset + plus, *writable),
        Resolved::Memory { region, offset } => At::Memory(**region, offset + plus),
        Resolved::Zero { .. } => At::Zero,
        Resolved::Error(errno) => At::Error(*errno),
        Resolved::Fault => At::Fault,
        Resolved::Device { device, offset, .. } => At::Device(**device, offset + plus),
        Resolved::Backend { backend, offset, writable } => At::Backend(**backend, offset + plus, *writable),
        Resolved::Tee { tee, offset } => At::Tee(**tee, offset + plus),
        Resolved::Filtered { filtered, at: start } => {
            let (resolved, len) = filtered.behind(start + plus, false, 1);
            assert_eq!(len, 1);
            let (other, _) = filtered.behind(start + plus, true, 1);
            assert!(matches!(other, Resolved::Error(1)));
            assert!(matches!(filtered.elsewhere(start + plus, 1), (Resolved::Fault, 1)));
            at(&resolved, 0)
        }
    }
}

fn leaf() -> impl Strategy<Value = Extent<Numbers>> {
    prop_oneof![
        (0u32..4, 0u64..1000, any::<bool>()).prop_map(|(file, offset, writable)| Extent::Data {
            file,
            offset,
            writable
        }),
        (0u32..4, 0u64..1000).prop_map(|(region, offset)| Extent::Memory { region, offset }),
        (0u32..4, 0u64..1000, any::<bool>()).prop_map(|(backend, offset, writable)| Extent::Backend {
            backend,
            offset,
            writable
        }),
        (0u32..4, 0u64..1000).prop_map(|(tee, offset)| Extent::Tee { tee, offset }),
        Just(Extent::Zero { discard_writes: true }),
        (1i32..100).prop_map(Extent::Error),
        (0u32..4, 0u64..1000).prop_map(|(device, offset)| Extent::Device { device, offset, writable: true }),
    ]
}

fn extent() -> impl Strategy<Value = Extent<Numbers>> {
    prop_oneof![
        3 => leaf(),
        1 => Just(Extent::Fault),
        1 => leaf().prop_map(|leg| {
            Extent::Filtered(Arc::new(Filtered { filter: (), legs: [leg, Extent::Error(1), Extent::Fault] }))
        }),
        1 => (1u64..9, 1u64..5, any::<prop::sample::Index>(), leaf()).prop_map(|(chunk, stripes, stripe, leaf)| {
            Extent::Unstriped { chunk, stripe: stripe.index(stripes as usize) as u64, stripes, striped: leaf.into() }
        }),
        2 => (1u64..9, prop::collection::vec(leaf(), 1..5))
            .prop_map(|(chunk, legs)| Extent::Stripes { chunk, legs: legs.into() }),
    ]
}

/// The model: the location of byte `i` by the definition of each kind.
fn model(extent: &Extent<Numbers>, i: u64) -> At {
    match extent {
        Extent::Data { file, offset, writable } => At::Data(*file, offset + i, *writable),
        Extent::Memory { region, offset } => At::Memory(*region, offset + i),
        Extent::Zero { .. } => At::Zero,
        Extent::Error(errno) => At::Error(*errno),
        Extent::Device { device, offset, .. } => At::Device(*device, offset + i),
        Extent::Stripes { chunk, legs } => {
            let n = legs.len() as u64;
            model(&legs[(i / chunk % n) as usize], i / chunk / n * chunk + i % chunk)
        }
        Extent::Backend { backend, offset, writable } => At::Backend(*backend, offset + i, *writable),
        Extent::Tee { tee, offset } => At::Tee(*tee, offset + i),
        Extent::Filtered(filtered) => model(&filtered.legs[0], i),
        Extent::Unstriped { chunk, stripe, stripes, striped } => {
            // Byte by byte through the stripes, to the i-th byte that is on this one.
            let of_stripe = |at: &u64| at / chunk % stripes == *stripe;
            model(striped, (0..).filter(of_stripe).nth(i as usize).unwrap())
        }
        Extent::Fault | Extent::Table(_) => At::Fault,
    }
}

proptest! {
    #[test]
    fn every_lookup_agrees_with_the_definition(
        parts in prop::collection::vec((1u64..40, extent()), 1..=many(11)),
        queries in prop::collection::vec((0u64..500, 1u64..100), 1..=many(29)),
    ) {
        let (mut bytes, mut segments, mut start) = (Vec::new(), Vec::new(), 0);
        for (owner, (len, extent)) in parts.into_iter().enumerate() {
            bytes.extend((0..len).map(|i| (owner as u32, model(&extent, i))));
            segments.push(Segment { start, end: start + len, owner: owner as u32, extent });
            start += len;
        }
        let map = Map::new(segments, vec![]).unwrap();
        prop_assert_eq!(map.size(), start);
        for &(offset, len) in &queries {
            // The whole segment, for any extent.
            let of = |at: u64| bytes.get(at as usize).map(|(owner, _)| *owner);
            let owned = (offset..(offset + len).min(start)).take_while(|&at| of(at) == of(offset)).count() as u64;
            prop_assert_eq!(map.owner(offset, len), of(offset).map(|owner| (owner, owned)));
        }
        for (offset, len) in queries {
            match map.lookup(offset, len) {
                None => prop_assert!(offset >= start),
                Some(piece) => {
                    prop_assert!(piece.len >= 1 && piece.len <= len && offset + piece.len <= start);
                    for i in 0..piece.len {
                        prop_assert_eq!((piece.owner, at(&piece.resolved, i)), bytes[(offset + i) as usize]);
                    }
                }
            }
        }
    }

    /// One hint for three maps, as after a swap of tables; starts near each other and far apart, so that lookups hit
    /// the hinted segment, the one after it, and others.
    #[test]
    fn a_hint_never_changes_an_answer_whichever_map_it_comes_from(
        maps in prop::collection::vec(prop::collection::vec(1u64..30, 1..=many(39)), 3),
        queries in prop::collection::vec((0usize..3, any::<bool>(), 0u64..700, 1u64..80), 1..=many(79)),
    ) {
        let maps: Vec<(Map<Numbers>, Vec<u32>)> = maps.into_iter().map(|lengths| {
            let (mut segments, mut owners, mut start) = (Vec::new(), Vec::new(), 0);
            for (owner, len) in (0..).zip(lengths) {
                // For a place, the model has the segment and the distance from its start.
                let extent = Extent::Data { file: owner, offset: 0, writable: true };
                segments.push(Segment { start, end: start + len, owner, extent });
                owners.extend(std::iter::repeat_n(owner, len as usize));
                start += len;
            }
            (Map::new(segments, vec![]).unwrap(), owners)
        }).collect();
        let (hint, mut end) = (Hint::default(), 0);
        for (which, goes_on, offset, len) in queries {
            let (map, owners) = &maps[which];
            let offset = if goes_on { end } else { offset };
            let piece = map.lookup_near(&hint, offset, len);
            let Some(&owner) = owners.get(offset as usize) else {
                prop_assert!(piece.is_none());
                continue;
            };
            let piece = piece.unwrap();
            end = offset + piece.len;
            let start = owners.iter().position(|&other| other == owner).unwrap() as u64;
            let reach = owners[offset as usize..].iter().take_while(|&&other| other == owner).count() as u64;
            prop_assert_eq!((piece.owner, piece.len), (owner, len.min(reach)));
            prop_assert_eq!(at(&piece.resolved, 0), At::Data(owner, offset - start, true));
            let bisected = map.lookup(offset, len).unwrap();
            let (one, other) = (at(&bisected.resolved, 0), at(&piece.resolved, 0));
            prop_assert_eq!((bisected.owner, bisected.len, one), (piece.owner, piece.len, other));
        }
    }

    /// Pages of one entry, to have several groups of them, and of eight.
    #[test]
    fn a_cluster_table_is_the_list_of_its_entries(
        page in prop::sample::select(vec![1u64, 8]),
        installs in prop::collection::vec(
            (0u64..590, prop::collection::vec((0u64..5, 0u64..3, 0u64..8), 1..=many(19))), 0..=many(19)
        ),
        drops in prop::collection::vec(0u64..600, 0..=many(29)),
        queries in prop::collection::vec((0u64..600 * 1024, 1u64..9000), 1..=many(39)),
    ) {
        const CLUSTER: u64 = 1024;
        const CLUSTERS: u64 = 600;
        let table = Arc::new(ClusterTable::<Numbers>::new(CLUSTERS * CLUSTER, CLUSTER, page, vec![7, 8, 9]).unwrap());
        let mut model = [0u64; CLUSTERS as usize];
        for (first, entries) in installs {
            let entries: Vec<u64> = entries.iter().map(|(kind, file, at)| kind << 61 | file << 49 | (at * 2)).collect();
            let installed = table.install(first, &entries);
            if first as usize + entries.len() <= CLUSTERS as usize {
                installed.unwrap();
                model[first as usize..][..entries.len()].copy_from_slice(&entries);
            } else {
                prop_assert!(installed.is_err(), "past the end");
            }
        }
        for number in drops {
            let dropped = table.drop_page(number);
            prop_assert_eq!(dropped.is_ok(), number < CLUSTERS / page);
            if dropped.is_ok() {
                model[(number * page) as usize..][..page as usize].fill(0);
            }
        }
        let extent = Extent::Table(table.clone());
        let map = Map::new(vec![Segment { start: 0, end: CLUSTERS * CLUSTER, owner: 0, extent }], vec![]).unwrap();
        for (offset, len) in queries {
            let piece = map.lookup(offset, len).unwrap();
            for i in [0, piece.len / 2, piece.len - 1] {
                let entry = Entry(model[((offset + i) / CLUSTER) as usize]);
                let within = (offset + i) % CLUSTER;
                let expected = match entry.kind() {
                    Entry::KIND_DATA => At::Data(7 + entry.file() as u32, entry.offset() + within, true),
                    Entry::KIND_READ_ONLY => At::Data(7 + entry.file() as u32, entry.offset() + within, false),
                    Entry::KIND_ZERO => At::Zero,
                    Entry::KIND_ERROR => At::Error(5),
                    _ => At::Fault,
                };
                prop_assert_eq!(at(&piece.resolved, i), expected, "byte {} of {}+{}", i, offset, piece.len);
            }
        }
    }
}

#[test]
fn contiguous_clusters_are_one_piece() {
    let size = many(1 << 30) as u64;
    let table = ClusterTable::<Numbers>::new(size, 65536, many(4096) as u64, vec![1]).unwrap();
    table.fill(0, many(4096) as u64, Entry(Entry::KIND_DATA << 61 | 8)).unwrap();
    let extent = Extent::Table(Arc::new(table));
    let map = Map::new(vec![Segment { start: 0, end: size, owner: 0, extent }], vec![]).unwrap();
    assert_eq!(map.lookup(5000, 1 << 20).unwrap().len, 1 << 20);
}

#[test]
fn bad_maps_say_what_is_wrong() {
    let zero = |start, end| Segment::<Numbers> { start, end, owner: 0, extent: Extent::Zero { discard_writes: true } };
    let error = |segments| Map::new(segments, vec![]).map(|_| ()).unwrap_err();
    assert_eq!(error(vec![zero(0, 8), zero(9, 12)]), MapError::Gap { at: 8, start: 9 });
    assert_eq!(error(vec![zero(0, 8), zero(7, 12)]), MapError::Gap { at: 8, start: 7 });
    assert_eq!(error(vec![zero(0, 0)]), MapError::Length { start: 0, length: 0 });
    assert!(matches!(error(vec![zero(0, 1 << 63)]), MapError::Length { .. }));
}

#[test]
fn a_map_without_segments_has_nothing_anywhere() {
    let map = Map::<Numbers>::new(vec![], vec![]).unwrap();
    assert_eq!(map.size(), 0);
    for (offset, len) in [(0, 0), (0, 1), (u64::MAX, 1)] {
        assert!(map.lookup(offset, len).is_none());
        assert!(map.lookup_near(&Hint::default(), offset, len).is_none());
        assert!(map.owner(offset, len).is_none());
    }
}

#[test]
fn entries_that_name_no_file_are_refused() {
    let table = ClusterTable::<Numbers>::new(1 << 20, 512, 16, vec![1]).unwrap();
    assert!(table.install(0, &[Entry::KIND_DATA << 61 | 1 << 49]).is_err());
    assert!(table.install(0, &[7 << 61]).is_err());
    assert!(table.fill(0, 3000, Entry::FAULT).is_err());
    assert!(ClusterTable::<Numbers>::new(1 << 20, 513, 16, vec![]).is_err());
}

#[test]
fn missing_pages_have_the_entries_of_a_run_in_a_device() {
    const CLUSTER: u64 = 1024;
    let missing = Entry(Entry::KIND_READ_ONLY << 61 | 1 << 49 | 100);
    let table = ClusterTable::<Numbers>::new(40 * CLUSTER, CLUSTER, 16, vec![7]).unwrap();
    let table = Arc::new(table.with_devices(vec![8, 9], missing).unwrap());
    let extent = Extent::Table(table.clone());
    let map = Map::new(vec![Segment { start: 0, end: 40 * CLUSTER, owner: 0, extent }], vec![]).unwrap();
    let in_device = |at, expected: (u32, u64, bool), run| {
        let piece = map.lookup(at, 1 << 20).unwrap();
        let Resolved::Device { device, offset, writable } = piece.resolved else { panic!("{:?}", piece.resolved) };
        assert_eq!(((*device, offset, writable), piece.len), (expected, run), "at {at}");
    };
    in_device(700, (8, 100 * 512 + 700, false), 16 * CLUSTER - 700);
    in_device(17 * CLUSTER, (8, 100 * 512 + 17 * CLUSTER, false), 15 * CLUSTER);

    table.fill(20, 2, Entry(Entry::KIND_DATA << 61 | 2 << 49 | 6)).unwrap();
    in_device(17 * CLUSTER, (8, 100 * 512 + 17 * CLUSTER, false), 3 * CLUSTER);
    in_device(20 * CLUSTER + 5, (9, 6 * 512 + 5, true), 2 * CLUSTER - 5);
    in_device(22 * CLUSTER, (8, 100 * 512 + 22 * CLUSTER, false), 10 * CLUSTER);
    assert_eq!(table.entry(39).unwrap().offset(), 100 * 512 + 39 * CLUSTER, "of a missing page");

    table.fill(0, 1, Entry(Entry::KIND_DATA << 61 | 6)).unwrap();
    assert!(matches!(map.lookup(0, 1).unwrap().resolved, Resolved::Data { file: 7, writable: true, .. }));
    table.drop_page(1).unwrap();
    in_device(20 * CLUSTER, (8, 100 * 512 + 20 * CLUSTER, false), 12 * CLUSTER);
}

#[test]
fn devices_that_a_table_does_not_have_are_refused() {
    let table = || ClusterTable::<Numbers>::new(1 << 20, 512, 16, vec![1]).unwrap();
    let data = |file: u64, offset: u64| Entry(Entry::KIND_DATA << 61 | file << 49 | offset);
    assert!(table().with_devices(vec![2], data(2, 0)).is_err());
    assert!(table().with_devices(vec![2], data(1, (1 << 49) - 5)).is_err(), "its run passes the largest offset");
    assert!(table().with_devices(vec![0; 4096], Entry::FAULT).is_err());
    assert!(table().with_devices(vec![2], data(1, 0)).unwrap().fill(0, 1, data(2, 0)).is_err());
}

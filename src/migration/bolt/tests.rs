use super::*;

const SIZE: usize = 512;

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

fn meta(bytes: &mut [u8], page: usize, root: u64, transaction: u64) {
    let pages = (bytes.len() / SIZE) as u64;
    let offset = page * SIZE + PAGE_HEADER;
    for (n, value) in [MAGIC, VERSION, 512, 0].into_iter().enumerate() {
        put(bytes, offset + 4 * n, &value.to_ne_bytes());
    }
    for (n, value) in [root, 0, 0, pages, transaction].into_iter().enumerate() {
        put(bytes, offset + 16 + 8 * n, &value.to_ne_bytes());
    }
    let sum = fnv_64a(&bytes[offset..offset + META_CHECKSUMMED]);
    put(bytes, offset + META_CHECKSUMMED, &sum.to_ne_bytes());
}

fn header(bytes: &mut [u8], page: usize, kind: u16, count: u16) {
    put(bytes, page * SIZE, &(page as u64).to_ne_bytes());
    put(bytes, page * SIZE + 8, &kind.to_ne_bytes());
    put(bytes, page * SIZE + 10, &count.to_ne_bytes());
}

/// Leaves of one entry each, whose value is the key.
fn leaf(bytes: &mut [u8], page: usize, key: &[u8]) {
    header(bytes, page, LEAF, 1);
    let length = u32::try_from(key.len()).unwrap();
    for (n, value) in [0, 16, length, length].into_iter().enumerate() {
        put(bytes, page * SIZE + PAGE_HEADER + 4 * n, &value.to_ne_bytes());
    }
    put(bytes, page * SIZE + 32, &[key, key].concat());
}

fn branch(bytes: &mut [u8], page: usize, children: &[u64]) {
    header(bytes, page, BRANCH, u16::try_from(children.len()).unwrap());
    for (n, child) in children.iter().enumerate() {
        put(bytes, page * SIZE + PAGE_HEADER + 16 * n + 8, &child.to_ne_bytes());
    }
}

/// A branch on page 4 over two leaves, 2 and 3.
fn file() -> Vec<u8> {
    let mut bytes = vec![0; 6 * SIZE];
    meta(&mut bytes, 0, 4, 2);
    meta(&mut bytes, 1, 2, 1);
    leaf(&mut bytes, 2, b"a");
    leaf(&mut bytes, 3, b"b");
    branch(&mut bytes, 4, &[2, 3]);
    bytes
}

fn keys(bytes: &[u8]) -> Result<Vec<String>> {
    let database = Database::parse(bytes)?;
    let entries = database.read(&database.root())?;
    Ok(entries.into_keys().map(|key| String::from_utf8_lossy(key).into_owned()).collect())
}

#[test]
fn newest_valid_meta_page_is_used() {
    let mut bytes = file();
    assert_eq!(keys(&bytes).unwrap(), ["a", "b"]);
    meta(&mut bytes, 1, 2, 3);
    assert_eq!(keys(&bytes).unwrap(), ["a"], "the second is newer");
    bytes[SIZE + 40] ^= 1;
    assert_eq!(keys(&bytes).unwrap(), ["a", "b"], "the newer one is damaged");
    let mut bytes = file();
    bytes[40] ^= 1;
    assert_eq!(keys(&bytes).unwrap(), ["a"], "the first is damaged, with the page size");
    bytes[SIZE + 40] ^= 1;
    let message = keys(&bytes).unwrap_err().to_string();
    assert!(message.contains("of 3072 bytes: neither meta page is valid; the first: its checksum is"), "{message}");
}

#[test]
fn file_that_is_not_bbolt_is_refused_with_the_reason() {
    for (bytes, why) in [
        (&b""[..], "of 0 bytes: neither meta page is valid; the first: it is too short"),
        (&[0; 8192], "it begins with 0x00000000 instead of 0xed0cdaed"),
        (&b"SQLite format 3".repeat(100), "it begins with"),
    ] {
        let message = keys(bytes).unwrap_err().to_string();
        assert!(message.contains(why), "{message}");
    }
    let mut old = file();
    put(&mut old, PAGE_HEADER + 4, &1_u32.to_ne_bytes());
    old.truncate(SIZE);
    assert!(keys(&old).unwrap_err().to_string().contains("its format version is 1"));
    let short = &file()[..5 * SIZE];
    assert_eq!(keys(short), Err(Error::Truncated { bytes: 5 * SIZE, needs: 6 * SIZE as u64 }));
}

#[test]
fn damaged_page_is_named_with_its_corruption() {
    let corruption = |damage: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = file();
        damage(&mut bytes);
        keys(&bytes).unwrap_err()
    };
    let page = |page, corruption| Error::Page { page, corruption };
    assert_eq!(corruption(&|b| branch(b, 4, &[2, 99])), page(99, Corruption::OutOfRange { pages: 6 }));
    assert_eq!(corruption(&|b| branch(b, 4, &[0])), page(0, Corruption::OutOfRange { pages: 6 }));
    assert_eq!(corruption(&|b| branch(b, 4, &[2, 2])), page(2, Corruption::Shared));
    assert_eq!(corruption(&|b| branch(b, 4, &[4])), page(4, Corruption::Shared));
    assert_eq!(corruption(&|b| branch(b, 4, &[3, 2])), page(2, Corruption::Order { number: 0 }));
    assert_eq!(corruption(&|b| header(b, 3, 0x10, 1)), page(3, Corruption::Type(0x10)));
    assert_eq!(corruption(&|b| put(b, 3 * SIZE, &7_u64.to_ne_bytes())), page(3, Corruption::Number(7)));
    assert_eq!(corruption(&|b| put(b, 3 * SIZE + 12, &3_u32.to_ne_bytes())), page(3, Corruption::Overflow(3)));
    assert_eq!(corruption(&|b| header(b, 3, LEAF, 65535)), page(3, Corruption::Order { number: 1 }));
    assert_eq!(corruption(&|b| header(b, 4, BRANCH, 65535)), page(4, Corruption::Entry { number: 31 }));
    for field in 1..4 {
        let offset = 3 * SIZE + PAGE_HEADER + 4 * field;
        assert_eq!(corruption(&|b| put(b, offset, &u32::MAX.to_ne_bytes())), page(3, Corruption::Entry { number: 0 }));
    }
    let to_bucket = |b: &mut Vec<u8>| put(b, 3 * SIZE + PAGE_HEADER, &IS_BUCKET.to_ne_bytes());
    assert_eq!(corruption(&to_bucket), page(3, Corruption::Entry { number: 0 }), "a bucket of one byte");
}

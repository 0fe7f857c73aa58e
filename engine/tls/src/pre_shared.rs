//! Files of pre-shared keys, as `psktool` makes them: lines of `user:key`, the key in hexadecimal.
//!
//! A user that begins with `#` is in hexadecimal, too. Messages have numbers of lines, never keys.

use std::collections::HashMap;

/// Longest key in bytes: OpenSSL has no room for a longer one.
const LONGEST: usize = 256;
/// Shortest key in bytes: a key that can be guessed protects nothing.
const SHORTEST: usize = 16;

/// Keys by user.
pub type Keys = HashMap<Vec<u8>, Vec<u8>>;

/// Parses the contents of a file. Err: what is wrong.
pub fn parse(contents: &[u8]) -> Result<Keys, String> {
    let mut keys = Keys::new();
    for (number, line) in contents.split(|&byte| byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let wrong = |what: &str| format!("line {}: {what}", number + 1);
        let colon = line.iter().rposition(|&byte| byte == b':').ok_or_else(|| wrong("no user:key"))?;
        let (user, key) = (&line[..colon], &line[colon + 1..]);
        let user = match user.strip_prefix(b"#") {
            Some(coded) => bytes(coded).ok_or_else(|| wrong("the user is not hexadecimal"))?,
            None => user.to_vec(),
        };
        if user.is_empty() {
            return Err(wrong("no user before the colon"));
        }
        let key = bytes(key).ok_or_else(|| wrong("the key is not hexadecimal"))?;
        if !(SHORTEST..=LONGEST).contains(&key.len()) {
            return Err(wrong(&format!("a key of {} bytes; it must have {SHORTEST} to {LONGEST}", key.len())));
        }
        if keys.insert(user, key).is_some() {
            return Err(wrong("the user is there twice"));
        }
    }
    if keys.is_empty() {
        return Err("there are no keys".to_owned());
    }
    Ok(keys)
}

fn bytes(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    text.chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0F";

    #[test]
    fn users_and_keys_are_found() -> Result<(), String> {
        let keys = parse(format!("alice:{KEY}\n\n#626f62:{KEY}\r\na:b:{KEY}").as_bytes())?;
        let key: Vec<u8> = (0..16).collect();
        for user in ["alice", "bob", "a:b"] {
            assert_eq!(keys.get(user.as_bytes()), Some(&key), "{user}");
        }
        assert_eq!(keys.len(), 3);
        Ok(())
    }

    #[test]
    fn what_is_wrong_has_the_number_of_its_line_and_no_key() {
        for (line, said) in [
            ("alice", "line 2: no user:key"),
            (":00", "line 2: no user before the colon"),
            ("alice:0", "line 2: the key is not hexadecimal"),
            ("alice:0g", "line 2: the key is not hexadecimal"),
            ("#0g:00", "line 2: the user is not hexadecimal"),
            ("alice:0011", "line 2: a key of 2 bytes; it must have 16 to 256"),
            (&format!("eve:{KEY}"), "line 2: the user is there twice"),
        ] {
            assert_eq!(parse(format!("eve:{KEY}\n{line}\n").as_bytes()), Err(said.to_owned()), "{line}");
        }
        assert_eq!(parse(b"\n"), Err("there are no keys".to_owned()));
    }
}

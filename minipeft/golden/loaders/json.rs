// JSON, as much as the vectors need. Anything that is no JSON is an Err.
#![allow(dead_code, non_snake_case)]
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    Number(String), // with all its digits
    Text(String),
    List(Vec<Json>),
    Map(BTreeMap<String, Json>),
}

pub type Result<T> = std::result::Result<T, String>;

impl Json {
    pub fn parse(text: &str) -> Result<Json> {
        let mut parser = Parser { text: text.as_bytes(), at: 0 };
        let json = parser.value(0)?;
        if parser.peek() == 0 { Ok(json) } else { Err("no JSON".into()) }
    }
    pub fn get(&self, name: &str) -> Option<&Json> {
        if let Json::Map(members) = self { members.get(name) } else { None }
    }
    pub fn at(&self, name: &str) -> Result<&Json> {
        self.get(name).ok_or_else(|| format!("no {name}"))
    }
    pub fn number(&self) -> Result<f64> {
        match self {
            Json::Number(digits) => digits.parse().map_err(|_| format!("no number: {digits}")),
            _ => Err("no number".into()),
        }
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn peek(&mut self) -> u8 {
        while self.at < self.text.len() && b" \t\r\n".contains(&self.text[self.at]) {
            self.at += 1;
        }
        self.text.get(self.at).copied().unwrap_or(0)
    }
    fn take(&mut self) -> Result<u8> {
        self.at += 1;
        self.text.get(self.at - 1).copied().ok_or_else(|| "no JSON".into())
    }
    fn expect(&mut self, c: u8) -> Result<()> {
        self.peek();
        if self.take()? == c { Ok(()) } else { Err("no JSON".into()) }
    }
    fn word(&mut self, word: &str, json: Json) -> Result<Json> {
        let right = self.text[self.at..].starts_with(word.as_bytes());
        self.at += word.len();
        if right { Ok(json) } else { Err("no JSON".into()) }
    }
    fn hex4(&mut self) -> Result<u16> {
        let digits = self.text.get(self.at..self.at + 4).ok_or("no JSON")?;
        self.at += 4;
        let digits = std::str::from_utf8(digits).map_err(|_| "no JSON")?;
        u16::from_str_radix(digits, 16).map_err(|_| "no JSON".into())
    }
    fn text(&mut self) -> Result<String> {
        self.expect(b'"')?;
        let mut found = Vec::new();
        loop {
            match self.take()? {
                b'"' => return String::from_utf8(found).map_err(|_| "no UTF-8".into()),
                b'\\' => match self.take()? {
                    b'u' => {
                        let mut units = vec![self.hex4()?];
                        if (0xD800..0xDC00).contains(&units[0]) {
                            self.at += 2; // the second half of a surrogate pair
                            units.push(self.hex4()?);
                        }
                        found.extend(String::from_utf16_lossy(&units).bytes());
                    }
                    c => found.push(match c {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'b' => 8,
                        b'f' => 12,
                        other => other,
                    }),
                },
                c => found.push(c),
            }
        }
    }
    fn value(&mut self, depth: usize) -> Result<Json> {
        if depth > 64 {
            return Err("JSON is nested too deeply".into());
        }
        match self.peek() {
            b'{' => {
                let mut members = BTreeMap::new();
                self.at += 1;
                while self.peek() != b'}' {
                    if !members.is_empty() {
                        self.expect(b',')?;
                    }
                    let name = self.text()?;
                    self.expect(b':')?;
                    members.insert(name, self.value(depth + 1)?);
                }
                self.at += 1;
                Ok(Json::Map(members))
            }
            b'[' => {
                let mut items = Vec::new();
                self.at += 1;
                while self.peek() != b']' {
                    if !items.is_empty() {
                        self.expect(b',')?;
                    }
                    items.push(self.value(depth + 1)?);
                }
                self.at += 1;
                Ok(Json::List(items))
            }
            b'"' => Ok(Json::Text(self.text()?)),
            b't' => self.word("true", Json::Bool(true)),
            b'f' => self.word("false", Json::Bool(false)),
            b'n' => self.word("null", Json::Null),
            _ => {
                let from = self.at;
                while self.text.get(self.at).map_or(false, |c| b"+-.eE0123456789".contains(c)) {
                    self.at += 1;
                }
                if from == self.at {
                    return Err("no JSON".into());
                }
                Ok(Json::Number(String::from_utf8_lossy(&self.text[from..self.at]).into()))
            }
        }
    }
}

pub trait Read: Sized {
    fn read(json: &Json) -> Result<Self>;
}

impl Read for Json {
    fn read(json: &Json) -> Result<Self> {
        Ok(json.clone())
    }
}

impl Read for String {
    fn read(json: &Json) -> Result<Self> {
        if let Json::Text(text) = json { Ok(text.clone()) } else { Err("no text".into()) }
    }
}

impl Read for i64 {
    fn read(json: &Json) -> Result<Self> {
        Ok(json.number()? as i64)
    }
}

impl<T: Read> Read for Vec<T> {
    fn read(json: &Json) -> Result<Self> {
        match json {
            Json::List(items) => items.iter().map(T::read).collect(),
            _ => Err("no list".into()),
        }
    }
}

impl<T: Read> Read for BTreeMap<String, T> {
    fn read(json: &Json) -> Result<Self> {
        let pair = |(name, json): (&String, &Json)| Ok((name.clone(), T::read(json)?));
        match json {
            Json::Map(members) => members.iter().map(pair).collect(),
            _ => Err("no object".into()),
        }
    }
}

// Formulas are typeset on each page that the theme shows, from the copy of KaTeX beside this file.
document$.subscribe(({ body }) =>
  renderMathInElement(body, {
    delimiters: [
      { left: "$$", right: "$$", display: true },
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  }),
);

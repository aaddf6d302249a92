// The page at `/`: one Studio, whose engines answer over HTTP.
import { openPage } from "./studio.js";

const styles = await fetch(new URL("studio.css", import.meta.url));
openPage(document.getElementById("studio"), await styles.text());
